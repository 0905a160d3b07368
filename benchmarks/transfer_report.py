"""What the transfer benchmark's seconds come to: the tables and the RESULT. Pure, but for `print_table`."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

HOST, SPACES = "same host", "namespaces"


@dataclass(frozen=True, slots=True)
class Case:
    """`batch` operations of `size` bytes in one call, `repeats` times a round."""

    size: int
    batch: int
    repeats: int = field(default=1, compare=False)

    @property
    def num_bytes(self) -> int:
        """Of one call."""
        return self.size * self.batch


LARGE, OBJECTS, SMALL = Case(64 << 20, 1), Case(4 << 20, 16), Case(4 << 10, 1)


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of each put and of the get after it; processor seconds of all of them at both ends together."""

    put: list[float]
    get: list[float]
    cpu_s: float


class Samples:
    """All samples, by (place, path, case)."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, Case], list[Sample]] = {}

    def add(self, place: str, path: str, case: Case, sample: Sample) -> None:
        """One more round's."""
        self._kept.setdefault((place, path, case), []).append(sample)

    def keys(self, place: str) -> list[tuple[str, Case]]:
        """Paths and cases of a place, by case."""
        return sorted((key[1:] for key in self._kept if key[0] == place), key=lambda key: (key[1].size, key[1].batch))

    def seconds(self, place: str, path: str, case: Case, way: str) -> list[float]:
        """Of every put, or every get."""
        kept = self._kept.get((place, path, case), [])
        return [one for sample in kept for one in (sample.put if way == "put" else sample.get)]

    def gbps(self, place: str, path: str, case: Case) -> float | None:
        """Bytes over time of puts and gets together, by their medians; None if not run."""
        times = [statistics.median(one) for way in ("put", "get") if (one := self.seconds(place, path, case, way))]
        return case.num_bytes * len(times) / sum(times) / 1e9 if times else None

    def cpu_s_per_gb(self, place: str, path: str, case: Case) -> float:
        """Processor seconds for 10^9 bytes moved once; the median of the rounds."""
        return statistics.median(
            sample.cpu_s / (case.num_bytes * (len(sample.put) + len(sample.get)) / 1e9)
            for sample in self._kept[place, path, case]
        )


def result(samples: Samples) -> dict[str, float | None]:
    """The RESULT: None for what did not run. Rates at 64 MiB in one operation; the store's and Mooncake's, which are
    held against each other, at 16 objects of 4 MiB."""
    small = [samples.seconds(HOST, "ucx", SMALL, way) for way in ("put", "get")]
    stores = [samples.gbps(SPACES, f"store-{kind}", OBJECTS) for kind in ("tcp", "ucx", "nixl")]
    verified, bare = (samples.seconds(HOST, f"{what}-shm", OBJECTS, "get") for what in ("store", "unverified"))
    found = {
        "memcpy_gbps": samples.gbps(HOST, "memcpy", LARGE),
        "iperf3_gbps": samples.gbps(SPACES, "iperf3", LARGE),
        "iperf3_same_host_gbps": samples.gbps(HOST, "iperf3", LARGE),
        "shm_put_get_gbps": samples.gbps(HOST, "shm", LARGE),
        "tcp_put_get_gbps": samples.gbps(HOST, "tcp", LARGE),
        "ucx_ns_gbps": samples.gbps(SPACES, "ucx", LARGE),
        "tcp_ns_gbps": samples.gbps(SPACES, "tcp", LARGE),
        "nixl_gbps": samples.gbps(HOST, "nixl", LARGE),
        "mooncake_put_get_gbps": samples.gbps(HOST, "mooncake", OBJECTS),
        "mooncake_ns_gbps": samples.gbps(SPACES, "mooncake", OBJECTS),
        "ucx_4k_us": max(statistics.median(one) for one in small) * 1e6 if all(small) else None,
        "verify_share": 1 - statistics.median(bare) / statistics.median(verified) if bare and verified else None,
        "store_put_get_gbps": samples.gbps(HOST, "store-shm", OBJECTS),
        "store_ns_put_get_gbps": max((one for one in stores if one is not None), default=None),
    }
    return {name: None if value is None else round(value, 3) for name, value in found.items()}


def print_table(samples: Samples, place: str, missing: Mapping[str, str]) -> None:
    """One line a path and case, and one for each path that did not run."""
    columns = ("put p50 us", "p99", "get p50 us", "p99", "GB/s", "CPU s/GB", "/limit")
    print(f"{place:<24}{'':>10}" + "".join(f"{name:>12}" for name in columns))
    for path, case in samples.keys(place):
        limit = samples.gbps(place, "memcpy", case) if place == HOST else samples.gbps(place, "iperf3", LARGE)
        gbps = samples.gbps(place, path, case)
        assert gbps is not None
        cells = [
            f"{value * 1e6:.1f}"
            for way in ("put", "get")
            for value in _quantiles(samples.seconds(place, path, case, way))
        ] or [""]
        cells += [""] * (4 - len(cells))
        cells += [f"{gbps:.3f}", f"{samples.cpu_s_per_gb(place, path, case):.3f}"]
        cells += [f"{gbps / limit:.2f}" if limit else ""]
        print(f"{path:<24}{_size(case):>10}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
    for path, reason in missing.items():
        print(f"{path:<24}  not run: {reason}", flush=True)


def _quantiles(seconds: list[float]) -> list[float]:
    """p50 and p99 (of few, the greatest)."""
    if not seconds:
        return []
    return [statistics.median(seconds), sorted(seconds)[min(len(seconds) - 1, int(0.99 * len(seconds)))]]


def _size(case: Case) -> str:
    unit = f"{case.size >> 20} MiB" if case.size >> 20 else f"{case.size >> 10} KiB"
    return unit if case.batch == 1 else f"{case.batch} x {unit}"
