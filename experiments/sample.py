"""python -m experiments.sample RUN|CHECKPOINT|FOLDER|HUB-ID "prompt" … [--n 8] [--out grid.png] [key=value …]

Pictures from a trained generator, an exported folder or published weights: a captioned grid, or with --separate one
file a picture. Settings are those of `sampling`, such as guidance=6 guidance_stop=5 top_k=100; each file's metadata
hold them with prompt and seed.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from experiments.command import run, split_prompts
from switti.errors import UserError
from switti.files import atomic_write


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run folder, checkpoint, exported folder or hub id")
    parser.add_argument("prompts", nargs="+", metavar="prompt or key=value")
    parser.add_argument("--n", type=int, default=1, help="pictures a prompt (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first picture, the next ones count on (%(default)s)"
    )
    parser.add_argument("--negative", default="", help="what guidance leads away from")
    parser.add_argument("--switch-prompt", help="caption that all pictures follow from --switch-scale on")
    parser.add_argument("--switch-scale", type=int, help="a scale, counted from 0")
    parser.add_argument(
        "--batch", type=int, default=8, help="pictures at a time; does not change them (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="PNG file (%(default)s)")
    parser.add_argument("--separate", action="store_true", help="OUT is a folder: one PNG a picture")
    options = parser.parse_intermixed_args(argv)
    prompts, settings = split_prompts(options.prompts)
    if not prompts:
        raise UserError("no prompt given")
    if (options.switch_prompt is None) != (options.switch_scale is None):
        raise UserError("--switch-prompt and --switch-scale belong together; give both or none")
    for name in ("n", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be at least 1")

    from experiments.trained import open_pipeline
    from switti.sampling.pictures import captioned_grid

    pipeline, origin = open_pipeline(options.run, settings)
    seeds = [options.seed + i for i in range(len(prompts) * options.n)]
    pictures = pipeline(
        prompts,
        num_images_per_prompt=options.n,
        seeds=seeds,
        negative_prompt=options.negative,
        switch_prompts=options.switch_prompt,
        switch_scale=options.switch_scale,
        batch_size=options.batch,
        progress=True,
    )
    captions = [prompt for prompt in prompts for _ in range(options.n)]
    details = {
        **origin,
        "negative_prompt": options.negative,
        "sampling": asdict(pipeline.sampling),
    }
    if options.switch_prompt is not None:
        details |= {"switch_prompt": options.switch_prompt, "switch_scale": options.switch_scale}
    if options.separate:
        for picture, caption, seed in zip(pictures, captions, seeds, strict=True):
            save(picture, options.out / f"{seed:05d}.png", {**details, "prompt": caption, "seed": seed})
    else:
        grid = captioned_grid(pictures, captions, columns=options.n if options.n > 1 else 8)
        save(grid, options.out, {**details, "prompts": captions, "seeds": seeds})
    cut = pipeline.text_encoder.truncated
    if cut:
        print(f"note: {cut} captions were cut to text.max_length={pipeline.text_encoder.max_length} tokens")
    print(options.out)
    return 0


def save(picture, path: Path, details: dict) -> None:  # type: ignore[no-untyped-def]
    """A PNG with its settings in the metadata, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("switti", json.dumps(details))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


if __name__ == "__main__":
    run(main)
