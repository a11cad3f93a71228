"""python -m experiments.reference_stats DATA --network NAME --out FILE.npz [--split validation] [metrics.key=value …]

Statistics of real images for FID and KID: mean, covariance, features and the network they belong to, for
experiments.evaluate IMAGES --reference FILE.npz.

DATA is a folder of shards or of image files. NAME is the network of the distance with its convention: alexnet, or
inception_pytorch_fid (the paper's), inception_torch_fidelity or inception_clean with metrics.inception=FILE.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli import argument_parser, run
from switti import arguments
from switti.errors import UserError
from switti.files import check_output, kind_of
from switti.metrics.catalogue import IMAGE_METRICS

if TYPE_CHECKING:
    import numpy as np

NETWORKS = {info.network: info.name for info in IMAGE_METRICS.values() if info.name.startswith("kid_")}


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("data", type=Path, help="folder of shards or images")
    parser.add_argument("settings", nargs="*", metavar="metrics.key=value")
    parser.add_argument("--network", choices=sorted(NETWORKS), required=True, help="features and convention")
    parser.add_argument("--out", type=Path, required=True, help="file to be written, .npz")
    parser.add_argument(
        "--split", default="validation", help="of a prepared folder (%(default)s); all: everything"
    )
    parser.add_argument("--batch", default="16", help="images at a time (%(default)s)")
    options = parser.parse_intermixed_args(argv)
    foreign = [setting for setting in options.settings if not setting.startswith("metrics.")]
    if foreign:
        raise UserError(f"{foreign[0]}: only metrics.* can be given here")
    batch = arguments.integer("--batch", options.batch, 1)
    if options.out.suffix != ".npz":
        raise UserError(f"--out {options.out} must end in .npz")
    check_output(options.out)

    from configs.loading import load

    name = NETWORKS[options.network]
    config = load("generator/tiny", [*options.settings, f"metrics.names=[{name}]"]).metrics

    import numpy as np
    import torch
    from tqdm import tqdm

    from evaluation.references import Reference, save_reference
    from evaluation.scoring import metric_digest
    from evaluation.statistics import statistics_of
    from switti.metrics.collection import build_metrics

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (group,) = build_metrics(config, device).distances
    rows: list[np.ndarray] = []
    with tqdm(unit="image", desc=options.network) as bar:
        for part in _batches(_images(options.data, options.split), batch):
            tensor = torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2).contiguous().to(device)
            rows.append(group.network(tensor).float().cpu().numpy())
            bar.update(len(part))
    if not rows:
        raise UserError(f"{options.data} holds no image of the split {options.split}")
    features = np.concatenate(rows)
    source = f"{options.data.resolve().name} ({options.split}, {len(features)} images)"
    digest = metric_digest(config, name)
    save_reference(options.out, Reference(options.network, digest, statistics_of(features), features, source))
    print(f"{options.out}: {len(features)} images, {features.shape[1]} features of {options.network}")
    return 0


def _images(data: Path, split: str) -> Iterator["np.ndarray"]:
    """RGB arrays [H, W, 3] of all images, in the order of their names."""
    import numpy as np

    from datamodules.images import SUFFIXES, BadImageError, decode
    from switti.files import read_bytes

    if kind_of(data) != "folder":
        raise UserError(f"{data} is not a folder")
    shards = sorted(data.glob("*.tar" if split == "all" else f"{split}*.tar"))
    files = [] if shards else sorted(p for p in data.iterdir() if p.suffix.lower() in SUFFIXES)
    if not shards and not files:
        raise UserError(f"{data} holds neither {split}*.tar nor images")

    def contents() -> Iterator[tuple[str, bytes]]:
        from datamodules.shards.index import ShardReader, load_index

        for shard in shards:
            index = load_index(shard)
            reader = ShardReader([index])
            try:
                for row, key in enumerate(index.keys):
                    yield f"{shard.name}: {key}", reader.image(0, row)
            finally:
                reader.close()
        for file in files:
            yield file.name, read_bytes(file, 256 << 20)

    for name, content in contents():
        try:
            yield np.asarray(decode(content))
        except BadImageError as error:
            raise UserError(f"{data}: {name}: {error}") from error


def _batches(images: Iterator["np.ndarray"], batch: int) -> Iterator[list["np.ndarray"]]:
    """Batches of images of one size."""
    part: list[np.ndarray] = []
    for image in images:
        if part and (len(part) == batch or image.shape != part[0].shape):
            yield part
            part = []
        part.append(image)
    if part:
        yield part


if __name__ == "__main__":
    run(main)
