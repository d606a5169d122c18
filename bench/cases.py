"""The loads, and how long each takes."""

from dataclasses import dataclass

OVERLOAD = 5.0  # times its capacity


@dataclass(frozen=True)
class Case:
    """One load. Closed loop: `clients`. Open loop: `of_capacity` times what the contender answered to 32 clients."""

    name: str
    seconds: float
    clients: int = 0
    of_capacity: float = 0.0
    photo: str = "small"  # or "large"
    bad: int = 0  # of a hundred calls, how many send half a picture
    hang_up: int = 0  # of a hundred calls, how many are given up while they are worked on
    recovery: float = 0.0  # seconds of 32 clients afterwards


MANY = Case("32 clients", 15, clients=32)
ONE = Case("1 client", 10, clients=1)
FEW = Case("8 clients", 15, clients=8)
BIG = Case("8 clients, 12 megapixels", 15, clients=8, photo="large")
HALF, MOST, WHOLE = (Case(f"{share:g} x capacity", 30, of_capacity=share) for share in (0.5, 0.8, 1.0))
TOO_MUCH = Case(f"{OVERLOAD:g} x capacity", 120, of_capacity=OVERLOAD, recovery=30)
SOAK = Case("soak", 1800, of_capacity=0.8, bad=1, hang_up=1)

EVERY = (MANY, ONE, FEW, BIG, HALF, MOST, WHOLE, TOO_MUCH)
REPEATED = (MANY, ONE)
QUICK = (Case(MANY.name, 8, clients=32), Case(ONE.name, 5, clients=1))
