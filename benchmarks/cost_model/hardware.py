"""Accelerator data-sheet figures and a roofline estimate of step time. Imports no torch."""

import re
from dataclasses import dataclass

from switti.errors import UserError
from switti.suggestions import did_you_mean, shortened
from switti.tables import aligned

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True)
class Accelerator:
    """Figures of the data sheets, for dense matrices.

    bfloat16, float32: operations per second in bfloat16 with float32 accumulation, and in float32 without tensor cores,
    which is torch's default. memory: bytes. bandwidth: of the memory, bytes per second. link: bytes per second between
    accelerators of a node, one direction. network: bytes per second of one accelerator's share of the node's network
    cards, one direction: in the vendor's own reference machine, or ASSUMED_NETWORK where there is none. source: where
    the figures come from. note: printed beside them in a plan.
    """

    bfloat16: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    source: str
    note: str = ""


# Cards for single machines: a share of 25 Gbit/s, such as one 200 Gbit/s card for eight.
ASSUMED_NETWORK = 25 * GIGA / 8
# 16 lanes, one direction.
_PCIE_4, _PCIE_5 = 31.5 * GIGA, 63 * GIGA

ACCELERATORS = {
    "rtx-3090": Accelerator(
        71 * TERA, 35.6 * TERA, 24 * GIGA, 936 * GIGA, _PCIE_4, ASSUMED_NETWORK,
        "NVIDIA Ampere GA102 white paper (GeForce RTX 3090); PCIe 4.0 ×16",
    ),
    "rtx-4090": Accelerator(
        165.2 * TERA, 82.6 * TERA, 24 * GIGA, 1008 * GIGA, _PCIE_4, ASSUMED_NETWORK,
        "NVIDIA Ada white paper (GeForce RTX 4090); PCIe 4.0 ×16",
    ),
    "rtx-5090": Accelerator(
        209.5 * TERA, 104.8 * TERA, 32 * GIGA, 1792 * GIGA, _PCIE_5, ASSUMED_NETWORK,
        "NVIDIA RTX Blackwell white paper (GeForce RTX 5090); PCIe 5.0 ×16",
    ),
    "rtx-a6000": Accelerator(
        154.8 * TERA, 38.7 * TERA, 48 * GIGA, 768 * GIGA, _PCIE_4, ASSUMED_NETWORK,
        "NVIDIA Ampere GA102 white paper (RTX A6000); PCIe 4.0 ×16",
    ),
    "l40s": Accelerator(
        362 * TERA, 91.6 * TERA, 48 * GIGA, 864 * GIGA, _PCIE_4, ASSUMED_NETWORK, "NVIDIA L40S data sheet; PCIe 4.0 ×16"
    ),
    # NVLink 300 GB/s both ways; DGX-1: four 100 Gbit/s cards for eight GPUs
    "v100-32gb": Accelerator(
        15.7 * TERA, 15.7 * TERA, 32 * GIGA, 900 * GIGA, 150 * GIGA, 6.25 * GIGA,
        "NVIDIA V100 data sheet (SXM2); DGX-1",
        "has no bfloat16 tensor cores: bfloat16 is counted at the rate of float32",
    ),
    # NVLink 600 GB/s both ways; DGX A100: one 200 Gbit/s card each
    "a100-40gb": Accelerator(
        312 * TERA, 19.5 * TERA, 40 * GIGA, 1555 * GIGA, 300 * GIGA, 25 * GIGA, "NVIDIA A100 data sheet (SXM); DGX A100"
    ),
    "a100-80gb": Accelerator(
        312 * TERA, 19.5 * TERA, 80 * GIGA, 2039 * GIGA, 300 * GIGA, 25 * GIGA, "NVIDIA A100 data sheet (SXM); DGX A100"
    ),
    # NVLink 900 GB/s both ways; DGX H100 and H200: one 400 Gbit/s card each
    "h100-80gb": Accelerator(
        989 * TERA, 67 * TERA, 80 * GIGA, 3350 * GIGA, 450 * GIGA, 50 * GIGA, "NVIDIA H100 data sheet (SXM); DGX H100"
    ),
    "h200-141gb": Accelerator(
        989 * TERA, 67 * TERA, 141 * GIGA, 4800 * GIGA, 450 * GIGA, 50 * GIGA, "NVIDIA H200 data sheet (SXM); DGX H200"
    ),
    # NVLink 1.8 TB/s both ways; DGX B200: one 400 Gbit/s card each
    "b200-180gb": Accelerator(
        2250 * TERA, 75 * TERA, 180 * GIGA, 8000 * GIGA, 900 * GIGA, 50 * GIGA,
        "NVIDIA Blackwell data sheet (HGX B200); DGX B200"
    ),
    # Infinity Fabric to seven others, 128 GB/s both ways each; reference platform: one 400 Gbit/s card each
    "mi300x-192gb": Accelerator(
        1307.4 * TERA, 163.4 * TERA, 192 * GIGA, 5300 * GIGA, 448 * GIGA, 50 * GIGA,
        "AMD Instinct MI300X data sheet and platform"
    ),
}  # fmt: skip


def find_accelerator(name: str) -> str:
    """The key of ACCELERATORS that `name` means, such as H100, rtx4090 or what the driver calls it.

    Raises UserError that lists the candidates if there are several, the nearest name if there is none.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    known = [word for word in words if not _BRAND.fullmatch(word)]
    matches = [key for key in ACCELERATORS if known and all(_is_part(word, key) for word in known)]
    exact = [key for key in matches if key == "-".join(known)]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    if matches:
        raise UserError(f"--gpu {name}: which one, {' or '.join(matches)}?")
    raise UserError(
        f"--gpu {shortened(name)} is not known{did_you_mean(name, ACCELERATORS)}; "
        f"there are {', '.join(ACCELERATORS)} (--gpu list shows their figures)"
    )


_BRAND = re.compile(r"nvidia|amd|geforce|instinct|tesla|quadro|sxm\d?|hbm\d?e?|oam")


def _is_part(word: str, key: str) -> bool:
    """Whether `word` is one of the key's parts, or several of them written together."""
    return word in key.split("-") or word == key.replace("-", "")


def table() -> str:
    """ACCELERATORS for reading."""
    rows: list[tuple[str, ...]] = [
        ("--gpu", "bfloat16", "float32", "memory", "bandwidth", "link", "network", "source")
    ]
    rows.append(
        (
            "",
            "TFLOP/s",
            "TFLOP/s",
            "GB",
            "GB/s",
            "GB/s",
            "GB/s",
            "GB = 10⁹ bytes; bandwidths in one direction",
        )
    )
    for key, gpu in ACCELERATORS.items():
        figures = (
            gpu.bfloat16 / TERA,
            gpu.float32 / TERA,
            gpu.memory / GIGA,
            gpu.bandwidth / GIGA,
            gpu.link / GIGA,
            gpu.network / GIGA,
        )
        assumed = "*" if gpu.network == ASSUMED_NETWORK else ""
        source = f"{gpu.source}; {gpu.note}" if gpu.note else gpu.source
        rows.append(
            (key, *(f"{figure:.5g}" for figure in figures[:-1]), f"{figures[-1]:.3g}{assumed}", source)
        )
    numbers = aligned([row[:-1] for row in rows])
    lines = [f"{line}  {row[-1]}" for line, row in zip(numbers, rows, strict=True)]
    return "\n".join([*lines, "* assumed: these cards have no reference machine of several nodes"])


@dataclass(frozen=True)
class Layout:
    """nodes × devices ranks, of which `shards` neighbors share one copy of the model."""

    nodes: int
    devices: int
    shards: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    @property
    def kind(self) -> str:
        """How the model is sharded, such as "hybrid (8 share a copy)"."""
        if self.shards == 1:
            return "no sharding"
        name = "full sharding" if self.shards == self.ranks else "hybrid"
        return f"{name} ({self.shards} share a copy)"

    @property
    def shards_cross_nodes(self) -> bool:
        return self.shards > self.devices


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on every rank: computing, exchanging, and both if they overlap entirely."""

    computing: float
    exchanging: float

    @property
    def seconds(self) -> float:
        return max(self.computing, self.exchanging)


def step_time(
    bfloat16: float,
    float32: float,
    received: dict[str, int],
    layout: Layout,
    accelerator: Accelerator,
    utilisation: float,
) -> StepTime:
    """bfloat16, float32: operations of one rank by type; received: its bytes by collective.

    utilisation: share of the stated operations per second that is reached. Exchanges run at the stated bandwidths:
    those among shards over the links of a node, or over the network if shards lie on several nodes, whose rings then
    share all of a node's cards; those among copies of the model over each accelerator's own card.
    """
    computing = (bfloat16 / accelerator.bfloat16 + float32 / accelerator.float32) / utilisation
    whole_node = min(accelerator.link, accelerator.network * layout.devices)
    shards = whole_node if layout.shards_cross_nodes else accelerator.link
    copies = accelerator.network if layout.nodes > 1 else accelerator.link
    # DDP: one ring over all ranks.
    if layout.shards == 1 and layout.nodes > 1:
        copies = whole_node
    among_shards = received.get("all-gather", 0) + received.get("reduce-scatter", 0)
    return StepTime(computing, among_shards / shards + received.get("all-reduce", 0) / copies)
