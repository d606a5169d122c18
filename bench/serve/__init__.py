"""The contenders, each as its own guide shows it."""
