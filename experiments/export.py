"""python -m experiments.export RUN|CHECKPOINT --out DIR [--dtype bfloat16] [--raw]

Writes a trained generator with its tokenizer as a folder of plain safetensors and JSON files that needs neither the
run nor Lightning: SwittiPipeline.from_pretrained(DIR), python -m experiments.sample DIR, or upload it to a hub with
hf upload OWNER/NAME DIR. The folder is written whole or not at all. The moving average is exported unless --raw.
"""

import argparse
from pathlib import Path

from experiments.cli import argument_parser, run


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__)
    add_arguments(parser)
    options = parser.parse_args(argv)
    return write(options.run, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the transformer (%(default)s)"
    )
    parser.add_argument(
        "--raw", action="store_true", help="the trained weights instead of their moving average"
    )


def write(target: Path, options: argparse.Namespace) -> int:
    """The folder `options.out` from a run or one of its checkpoints."""
    from configs.load_run import load_pipeline
    from switti.sampling.pipeline_folder import DTYPES, check_new

    check_new(options.out)
    pipeline, config, step = load_pipeline(target, [], ema=not options.raw)
    averaged = config.callbacks.ema_decay is not None and not options.raw
    details = {"run": config.name, "step": step, "averaged": averaged}
    pipeline.save_pretrained(options.out, dtype=DTYPES[options.dtype], details=details)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: step {step}, {options.dtype}, {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    run(main)
