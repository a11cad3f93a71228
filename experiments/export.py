"""python -m experiments.export RUN|CHECKPOINT --out DIR|FILE.safetensors [--dtype bfloat16] [--raw] [--verify]

Writes a trained generator as plain files that need neither the run nor Lightning; sharded checkpoints are put together.
DIR becomes a folder with generator, tokenizer, settings and a model card (README.md), for
SwittiPipeline.from_pretrained(DIR), python -m experiments.sample DIR, or a model hub: hf upload OWNER/NAME DIR. FILE
holds the generator's weights and settings alone, for load_generator(FILE) and init_from=FILE.

The output appears complete or not at all. The EMA is exported unless --raw. --verify first compares every byte of the
checkpoint with its checksum. One process without a GPU suffices; it needs memory for the weights alone.
"""

from pathlib import Path

from experiments.cli import argument_parser, run
from switti.errors import UserError
from switti.files import check_output


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument(
        "--out", type=Path, required=True, help="new or empty folder, or a file that ends in .safetensors"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the transformer (%(default)s)"
    )
    parser.add_argument("--raw", action="store_true", help="the trained weights instead of their EMA")
    parser.add_argument(
        "--verify", action="store_true", help="compare the checkpoint with its checksums first"
    )
    options = parser.parse_args(argv)

    from callbacks.checkpointing import corruption
    from configs.load_run import find_run, load_pipeline
    from reports.model_card_facts import read_facts
    from switti.sampling.model_card import RunFacts
    from switti.sampling.pipeline_folder import DTYPES, check_new
    from switti.tokenizer.rqvae import CODES
    from switti.weights.save import save_generator

    single = options.out.suffix == ".safetensors"
    if single:
        check_output(options.out)
    else:
        check_new(options.out)
    folder, checkpoint = find_run(options.run)
    if options.verify and (reason := corruption(checkpoint)):
        raise UserError(f"{checkpoint} cannot be used: {reason}")
    pipeline, config, step = load_pipeline(checkpoint, [], ema=not options.raw)
    dtype = DTYPES[options.dtype]
    if single:
        codes = {CODES: pipeline.tokenizer.quantize.fingerprint()}
        save_generator(pipeline.generator, options.out, codes, dtype)
        size = options.out.stat().st_size
    else:
        averaged = config.callbacks.ema_decay is not None and not options.raw
        details = {"run": config.name, "step": step, "averaged": averaged}
        try:
            facts = read_facts(folder, step, averaged)
        except UserError as error:
            facts = RunFacts(name=config.name)
            print(f"note: the model card lacks the run's facts: {error}")
        pipeline.save_pretrained(options.out, dtype=dtype, details=details, facts=facts)
        size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: step {step}, {options.dtype}, {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    run(main)
