"""What one replica carries, and what two autoscalers make of a day of traffic."""
