"""python -m experiments.consolidate RUN|CHECKPOINT --out DIR [--dtype bfloat16] [--raw]

Puts a checkpoint that many ranks have written together again: one folder of plain safetensors and JSON files, with the
tokenizer, for SwittiPipeline.from_pretrained(DIR) and all commands that take weights. Every byte of the checkpoint is
compared with its checksum first. One process on a machine without a GPU suffices; it needs memory for the weights, not
for the optimizer. The moving average is taken unless --raw.
"""

from experiments import export
from experiments.cli import argument_parser, run
from switti.errors import UserError


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__)
    export.add_arguments(parser)
    options = parser.parse_args(argv)

    from callbacks.checkpointing import corruption
    from configs.load_run import find_run

    _, checkpoint = find_run(options.run)
    if reason := corruption(checkpoint):
        raise UserError(f"{checkpoint} cannot be used: {reason}")
    return export.write(checkpoint, options)


if __name__ == "__main__":
    run(main)
