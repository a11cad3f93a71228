"""python -m experiments.bench [--quick] [--only train,sample,tokenizer,data,full,prune] [--json FILE]

Measures speed and memory against the plain formulation (dense mask, cache by concatenation, AdaLN at every scale, sort
over the full vocabulary: what the published implementation does), in one process with interleaved repetitions. Two
parts run only when named: `full` samples a 512 px image with 2.5 B parameters in bfloat16 (12 GiB), `prune` compares
sampling with and without token pruning. Prints a table of medians, ratios and shares of the machine's peak in matrix
products, in total and by scale; --json writes them with a description of the machine. Close other programs first: times
are wall-clock, but for `prune` on one thread of a CPU, which has the processor's.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.cli import argument_parser, run
from switti.errors import UserError
from switti.files import write_json

if TYPE_CHECKING:
    from benchmarks.report import Results

PARTS = ("train", "sample", "tokenizer", "data")
# 2.5 B parameters in bfloat16: 12 GiB of memory and some minutes, only on request.
FULL = "full"
# Sampling with token pruning against the same without, on request as well.
PRUNE = "prune"


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a small model and few repetitions: does it run at all?"
    )
    parser.add_argument(
        "--only",
        default=",".join(PARTS),
        help=f"parts, separated by commas (%(default)s; there are also {FULL} and {PRUNE})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    parts = options.only.split(",")
    for part in parts:
        if part not in (*PARTS, FULL, PRUNE):
            raise UserError(f"--only {part}: there are {', '.join((*PARTS, FULL, PRUNE))}")

    from benchmarks.measure import machine
    from benchmarks.pruned_sampling import PruningBenchmark
    from benchmarks.report import Results
    from benchmarks.suite import Suite

    results = Results()
    suite = Suite.quick() if options.quick else Suite()
    for part in parts:
        if part == "data":
            measure_data(results, suite.repetitions)
        elif part == PRUNE:
            (PruningBenchmark.quick() if options.quick else PruningBenchmark()).measure(results)
        else:
            getattr(suite, f"measure_{part}")(results)
    described = machine()
    print(results.table())
    print(device_line(results, described))
    if options.json:
        write_json(options.json, as_json(results, described, options.quick))
        print(options.json)
    return 0


def device_line(results: "Results", described: dict[str, Any]) -> str:
    """The device that ran the parts, its host, and the largest peaks that were measured, of products and of memory."""
    words = [f"{described['cpu']}, {described['threads']} threads"]
    if described["gpu"]:
        words.insert(0, described["gpu"])
    products = [value for name, value in results.raw.items() if name.endswith("matmul_peak.bfloat16")]
    speeds = [value for value in products if isinstance(value, int | float)]
    if speeds:
        words.append(f"{max(speeds) / 1e9:.4g} GFLOP/s in bfloat16 products")
    peaks = [value for name, value in results.raw.items() if name.endswith(".peak_bytes")]
    numbers = [value for value in peaks if isinstance(value, int | float)]
    if numbers:
        words.append(f"{max(numbers) / 1e9:.3g} GB at the most")
    return ", ".join([*words, f"torch {described['torch']}", described["date"]])


def measure_data(results: "Results", repetitions: int) -> None:
    """Images per second: shards to batches in this process and with two workers, against decoding alone."""
    import io
    import tempfile

    import numpy as np
    from PIL import Image

    from benchmarks.measure import interleaved_medians
    from datamodules.config import DataConfig
    from datamodules.datamodule import ShardDataModule
    from datamodules.images import decode
    from datamodules.prepare.writer import PreparedSample, ShardWriter

    generator = np.random.default_rng(0)
    images = []
    for _ in range(256):
        smooth = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((256, 256))
        buffer = io.BytesIO()
        smooth.save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), "train", len(images))
        for i, data in enumerate(images):
            writer.write(PreparedSample(f"{i:04d}", data, "jpg", "an image"), "bench")
        writer.close()
        shard = str(Path(folder) / "train-000000.tar")

        def read(workers: int) -> None:
            config = DataConfig(train=shard, validation=shard, workers=workers, batch_size=32)
            loader = iter(ShardDataModule(config, seed=0, resolution=256).train_dataloader())
            for _ in range(len(images) // 32):
                next(loader)

        jobs = {
            "decode_only": lambda: [decode(data).load() for data in images],
            "workers_0": lambda: read(0),
            "workers_2": lambda: read(2),
        }
        seconds = interleaved_medians(jobs, repetitions, "data")
    for name, value in seconds.items():
        results.raw[f"data.256.{name}.pictures_per_second"] = len(images) / value
    results.ratios["data.256.over_decoding"] = seconds["decode_only"] / seconds["workers_0"]


def as_json(results: "Results", described: dict[str, Any], quick: bool) -> dict[str, Any]:
    """{"ratios", "raw", "machine"} as plain containers."""
    content = {"ratios": results.ratios, "raw": results.raw, "machine": {**described, "quick": quick}}
    return json.loads(json.dumps(content))


if __name__ == "__main__":
    run(main)
