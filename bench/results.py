"""results.jsonl: one line for every run, then one for every measurement; a run that was cut off goes on.

The first line of a run is {"run", "identity"}; the others {"run", "contender", "round", "case", "at", "figures"}.
"""

import json
import time
from pathlib import Path
from typing import Any

from bench.figures import Spread, spread
from bundle.manifest import canonical, sha256

START = "start"


class Book:
    """The records of one run. The last run of the file is continued where it is of the same identity and not over."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        key = sha256(canonical(identity))[:8]
        lines = read(path)
        runs = [line for line in lines if "identity" in line]
        last = runs[-1]["run"] if runs else ""
        self.continued = last.endswith(key) and not any(line.get("over") for line in lines if line["run"] == last)
        self.run = last if self.continued else f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}-{key}"
        self.records = [line for line in lines if line["run"] == self.run and "case" in line]
        if not self.continued:
            self._append({"run": self.run, "identity": identity})

    def add(self, contender: str, number: int, case: str, figures: dict[str, Any]) -> None:
        at = time.strftime("%H:%M:%S", time.gmtime())
        record = {"run": self.run, "contender": contender, "round": number, "case": case, "at": at, "figures": figures}
        self.records.append(record)
        self._append(record)

    def finish(self) -> None:
        """The next run of the same identity is another one."""
        self._append({"run": self.run, "over": True})

    def has(self, contender: str, number: int, case: str) -> bool:
        """Whether it is measured; what failed is tried again when the run is continued."""
        return any(
            "error" not in record["figures"] for record in self._of(contender, case) if record["round"] == number
        )

    def values(self, contender: str, case: str, figure: str) -> list[Any]:
        return [r["figures"][figure] for r in self._of(contender, case) if r["figures"].get(figure) is not None]

    def spread(self, contender: str, case: str, figure: str) -> Spread | None:
        return spread(self.values(contender, case, figure))

    def total(self, contender: str, case: str, figure: str) -> Spread | None:
        """As spread; of a figure by process, the sum over them."""
        values = self.values(contender, case, figure)
        return spread([sum(value.values()) if isinstance(value, dict) else value for value in values])

    def median_total(self, contender: str, case: str, figure: str) -> float | None:
        found = self.total(contender, case, figure)
        return found.median if found else None

    def rows(self, contender: str, case: str) -> list[dict[str, Any]]:
        return [r["figures"] for r in self._of(contender, case) if "error" not in r["figures"]]

    def median(self, contender: str, case: str, figure: str) -> float | None:
        found = self.spread(contender, case, figure)
        return found.median if found else None

    def error(self, contender: str) -> str:
        """Why it was not measured; "" where it was."""
        errors = [
            r["figures"]["error"] for r in self.records if r["contender"] == contender and "error" in r["figures"]
        ]
        measured = any(r["contender"] == contender and "images_per_s" in r["figures"] for r in self.records)
        return errors[-1] if errors and not measured else ""

    def names(self) -> list[str]:
        return [contender["name"] for contender in self.identity["contenders"]]

    def _of(self, contender: str, case: str) -> list[dict[str, Any]]:
        return [r for r in self.records if r["contender"] == contender and r["case"] == case]

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # cut off there: it must not take this line with it
                    file.write(b"\n")
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line; one that was cut off when the machine went down is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
