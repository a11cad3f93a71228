"""What the makers of accelerators state, and how long a step so takes at best. Imports no torch."""

from dataclasses import dataclass

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True)
class Accelerator:
    """Figures of the data sheets, for dense matrices.

    half, single: operations a second in bfloat16, and in float32 outside of tensor cores, which is torch's default.
    memory: bytes. link: bytes a second between accelerators of a node, one direction. network: bytes a second that
    one accelerator's share of the node's network cards carries, one direction, in the maker's own reference machine.
    """

    half: float
    single: float
    memory: float
    link: float
    network: float


ACCELERATORS = {
    # NVIDIA A100 SXM: 312 TFLOP/s, 19.5 TFLOP/s, NVLink 600 GB/s both ways; DGX A100: one 200 Gbit/s card each
    "a100-40gb": Accelerator(312 * TERA, 19.5 * TERA, 40 * GIGA, 300 * GIGA, 25 * GIGA),
    "a100-80gb": Accelerator(312 * TERA, 19.5 * TERA, 80 * GIGA, 300 * GIGA, 25 * GIGA),
    # NVIDIA H100 and H200 SXM: 989 TFLOP/s, 67 TFLOP/s, NVLink 900 GB/s both ways; DGX H100: one 400 Gbit/s card each
    "h100-80gb": Accelerator(989 * TERA, 67 * TERA, 80 * GIGA, 450 * GIGA, 50 * GIGA),
    "h200-141gb": Accelerator(989 * TERA, 67 * TERA, 141 * GIGA, 450 * GIGA, 50 * GIGA),
}


@dataclass(frozen=True)
class Layout:
    """nodes × devices ranks, of which `shards` neighbours share one copy of the model."""

    nodes: int
    devices: int
    shards: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    @property
    def kind(self) -> str:
        """What is shared by whom, in words."""
        if self.shards == 1:
            return "no sharding"
        name = "full sharding" if self.shards == self.ranks else "hybrid"
        return f"{name} ({self.shards} share a copy)"

    @property
    def shards_cross_nodes(self) -> bool:
        return self.shards > self.devices


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step on every rank: computing, exchanging, and both if they overlap entirely."""

    computing: float
    exchanging: float

    @property
    def seconds(self) -> float:
        return max(self.computing, self.exchanging)


def step_time(
    half: float,
    single: float,
    received: dict[str, int],
    layout: Layout,
    accelerator: Accelerator,
    utilisation: float,
) -> StepTime:
    """half, single: operations of one rank in bfloat16 and in float32; received: its bytes by collective.

    utilisation: share of the stated operations a second that is reached. Exchanges run at the stated bandwidths: those
    among shards over the links of a node, or over the network if shards lie on several nodes, whose rings then share
    all of a node's cards; those among copies of the model over each accelerator's own card.
    """
    computing = (half / accelerator.half + single / accelerator.single) / utilisation
    whole_node = min(accelerator.link, accelerator.network * layout.devices)
    shards = whole_node if layout.shards_cross_nodes else accelerator.link
    copies = accelerator.network if layout.nodes > 1 else accelerator.link
    if layout.shards == 1 and layout.nodes > 1:  # DDP: one ring over everything
        copies = whole_node
    among_shards = received.get("all-gather", 0) + received.get("reduce-scatter", 0)
    return StepTime(computing, among_shards / shards + received.get("all-reduce", 0) / copies)
