"""The tokenizers' table: figures against numpy, other resolutions, what is refused, the page of the worst."""

import base64
import csv
import html
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_shards import make_set, make_shard
from PIL import Image
from torch import Tensor, nn

from configs.loading import load, to_yaml
from evaluation.tokenizer_tables import worst_first
from evaluation.tokenizers import EvaluationImages, labels
from experiments.evaluate_tokenizer import main
from reports.tokenizer_page import Shown, write_page
from switti.errors import UserError
from switti.metrics import tokenizer_quality
from switti.metrics.clip_iqa import ClipIqa, load_clip_iqa
from switti.metrics.tokenizer_quality import (
    QualityNetworks,
    TokenizerQuality,
    TokenizerReport,
    latent_errors,
    reconstruct,
)
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.save import save_tokenizer

SMALL = RQVAEConfig(
    scales=[1, 2], codebook_size=16, code_width=4, channels=32, multipliers=[1, 1, 1, 1], residual_blocks=1
)
Write = Callable[..., Path]


class Distance(nn.Module):
    """In place of LPIPS: the mean absolute difference on [-1, 1]."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


class Features(nn.Module):
    """In place of AlexNet: the mean colour, and zeros."""

    num_features = 256

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.pad(images.double().mean((2, 3)), (0, 253))


class Encoder:
    """In place of CLIP: the mean colour against two fixed directions."""

    width = 3

    def encode_images(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))

    def encode_texts(self, captions: list[str]) -> Tensor:
        return torch.eye(3)[[["Good photo.", "Bad photo."].index(caption) for caption in captions]]


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> QualityNetworks:
    found = QualityNetworks({"lpips_vgg": Distance()}, Features(), "alexnet")

    def build(device: object, judge: ClipIqa | None, inception: Path | None) -> QualityNetworks:
        assert inception is None
        return replace(found, clip_iqa=judge)

    monkeypatch.setattr(tokenizer_quality, "build_quality_networks", build)
    return found


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Saves a tokenizer at random; a run folder around it if a task is given."""

    def save(name: str, seed: int = 0, config: RQVAEConfig = SMALL, task: str | None = None) -> Path:
        torch.manual_seed(seed)
        folder = tmp_path / name
        save_tokenizer(RQVAE(config), folder / "tokenizer.safetensors")
        if task is not None:
            run = load("tokenizer/tiny", [f"task={task}", f"name={name}"])
            run.tokenizer = config
            run.model.scales, run.model.code_width = config.scales, config.code_width
            run.model.codebook_size = config.codebook_size
            (folder / "config.yaml").write_text(to_yaml(run))
            return folder
        return folder / "tokenizer.safetensors"

    return save


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_set(tmp_path / "data", [5, 4], "validation", damaged=("s1n0",))
    make_set(tmp_path / "data", [3], "train")
    return tmp_path / "data"


def read(path: Path) -> list[list[str]]:
    with path.open(newline="") as stream:
        return list(csv.reader(stream))


# ---- the command ------------------------------------------------------------------------------------------------


def test_table_of_a_run_and_a_file(
    tmp_path: Path, write: Write, data: Path, networks: QualityNetworks, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [write("tuned", 0, task="decoder"), write("plain", 1)]
    named = [str(source) for source in sources]
    options = ["--data", str(data), "--batch", "3", "--worst", "2", "--out", str(tmp_path / "out")]
    assert main([*named, *options]) == 0
    printed = capsys.readouterr().out
    assert f"8 images of {data}, 16 px" in printed and "CLIP-IQA is skipped" in printed
    assert "1 images cannot be read" in printed and "rfid_alexnet over 8 images is higher" in printed
    assert "8 of them have a side below 16 px and were enlarged" in printed
    table = read(tmp_path / "out/table.csv")
    assert table[0] == ["metric", "scale", "tuned", "plain"]
    values = {(row[0], row[1]): [float(value) for value in row[2:]] for row in table[1:]}
    rows = read(tmp_path / "out/images.csv")
    assert len(rows) == 1 + 2 * 8 and not any("s1n0" in row[0] for row in rows)

    images = torch.cat(list(EvaluationImages([str(data)], 16, 100).batches(4)))
    for place, seed in enumerate((0, 1)):
        torch.manual_seed(seed)
        model = RQVAE(SMALL).eval()
        tokens = model.tokenize(images)
        found = (model.decode(model.tokens_to_latent(tokens)).clamp(-1, 1).detach().numpy() + 1) / 2
        error = np.square(found.astype(np.float64) - (images.numpy() + 1) / 2).mean((1, 2, 3))
        psnrs = -10 * np.log10(error)
        assert values["psnr", ""][place] == pytest.approx(psnrs.mean(), rel=1e-5)
        shown = [float(row[2]) for row in rows[1:] if row[1] == table[0][2 + place]]
        assert shown == pytest.approx(psnrs.tolist(), rel=1e-5)
        assert values["codebook_use", ""][place] == len(np.unique(tokens)) / 16
        counts = np.bincount(tokens[:, 1:].flatten()) / 32
        entropy = -sum(p * math.log(p) for p in counts if p)
        assert values["perplexity", "1"][place] == pytest.approx(math.exp(entropy))


def test_error_after_each_scale(
    tmp_path: Path, write: Write, data: Path, networks: QualityNetworks, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """PSNR of the first five pictures, which end within a batch, decoded from scale 0 and from both scales."""
    monkeypatch.setattr(tokenizer_quality, "DECODED_BY_SCALE", 5)
    arguments = ["--data", str(data), "--batch", "3", "--out", str(tmp_path / "out")]
    assert main([str(write("plain", 1)), *arguments]) == 0
    assert "psnr_of_first_5: error after each scale" in capsys.readouterr().out
    found = [float(row[2]) for row in read(tmp_path / "out/table.csv") if row[0] == "psnr_of_first_5"]
    assert "psnr_of_first_5" in (tmp_path / "out/page.html").read_text()

    torch.manual_seed(1)
    model = RQVAE(SMALL).eval()
    images = torch.cat(list(EvaluationImages([str(data)], 16, 100).batches(4)))[:5]
    tokens, codes = model.tokenize(images), model.quantize.embedding.weight
    first, *_, last = model.quantize.quant_resi.qresi_ls  # of the coarsest and of the finest scale
    one = codes[tokens[:, :1]].mT.reshape(5, -1, 1, 1).expand(-1, -1, 2, 2)
    four = codes[tokens[:, 1:]].mT.reshape(5, -1, 2, 2)
    latent, expected = 0.0, []
    for rows, phi in ((one, first), (four, last)):
        latent = latent + 0.5 * rows + 0.5 * torch.nn.functional.conv2d(rows, phi.weight, phi.bias, padding=1)
        picture = model.decoder(model.post_quant_conv(latent)).clamp(-1, 1).detach().numpy()
        error = np.square((picture.astype(np.float64) - images.numpy()) / 2).mean((1, 2, 3))
        expected.append(-10 * np.log10(error).mean())
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_another_resolution(
    tmp_path: Path, write: Write, data: Path, networks: QualityNetworks, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write("plain"))
    out = ["--data", str(data), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"reads images of 16 px, not 24; give --scales that end with 3"):
        main([source, *out, "--resolution", "24"])
    assert main([source, *out, "--scales", "1,2,3"]) == 0
    printed = capsys.readouterr().out
    assert "24 px" in printed
    assert [row[1] for row in read(tmp_path / "out/table.csv") if row[0] == "latent_error"] == ["0", "1", "2"]


def test_what_is_refused(tmp_path: Path, write: Write, data: Path) -> None:
    generator = write("generator", task="generator")
    unfinished = write("unfinished", task="tokenizer")
    (unfinished / "tokenizer.safetensors").unlink()
    source = str(write("plain"))
    for sources, arguments, words in [
        ([str(generator)], [], "is a generator run"),
        ([str(unfinished)], [], "has no tokenizer.safetensors yet"),
        ([source, source], [], "named twice"),
        ([source], ["--images", "0"], "--images 0 must be at least 1"),
        ([source], ["--inception", "nowhere.pth"], "--inception nowhere.pth: no such file"),
        ([str(tmp_path / "nothing")], [], "no such file or folder"),
    ]:
        with pytest.raises(UserError, match=words):
            main([*sources, *arguments, "--data", str(data), "--out", str(tmp_path)])
    with pytest.raises(UserError, match=r"--data=.*matches no shard"):
        main([source, "--data", str(tmp_path / "none-*.tar"), "--out", str(tmp_path)])


def test_pictures_below_the_resolution_are_enlarged_and_counted(data: Path, tmp_path: Path) -> None:
    """Eight of 12 x 10 px besides two of 24 x 30, for squares of 24 px."""
    make_shard(tmp_path / "large" / "validation-000000.tar", ["a", "b"], size=(24, 30))
    pictures = EvaluationImages([str(data), str(tmp_path / "large")], 24, 100)
    images = torch.cat(list(pictures.batches(8)))
    assert images.shape == (10, 3, 24, 24) and (pictures.enlarged, pictures.unreadable) == (8, 1)


def test_a_run_whose_weights_are_of_another_shape(tmp_path: Path, write: Write, data: Path) -> None:
    run = write("run", task="tokenizer")
    save_tokenizer(RQVAE(replace(SMALL, scales=[1, 3])), run / "tokenizer.safetensors")
    with pytest.raises(UserError, match=r"tokenizer\.scales=\[1, 2\] \(the weights: \[1, 3\]\)"):
        main([str(run), "--data", str(data), "--out", str(tmp_path)])


def test_short_names_stay_different() -> None:
    sources = ["runs/a/demo", "runs/b/demo", "embedded:demo"]
    assert list(labels(sources)) == sources
    assert list(labels(["runs/a/one", "runs/b/two"])) == ["one", "two"]


# ---- figures ----------------------------------------------------------------------------------------------------


def test_latent_errors_in_closed_form() -> None:
    """Nothing: all is missing; half of f: a quarter of the energy; f itself: nothing is missing."""
    f = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    found = latent_errors(f, [torch.zeros_like(f), f / 2, f])
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.25, 0.0]] * 2, dtype=torch.float64))


def test_lossless_pictures_are_at_distance_zero(
    monkeypatch: pytest.MonkeyPatch, networks: QualityNetworks
) -> None:
    """A decoder that gives the pictures back: FID 0, LPIPS 0, SSIM 1, infinite PSNR; brighter ones: not."""
    model = RQVAE(SMALL).eval()
    images = torch.rand(4, 3, 16, 16) - 0.5
    for shift, far in ((0.0, False), (0.2, True)):
        monkeypatch.setattr(model, "decode", lambda f_hat, shift=shift: images + shift)
        quality = TokenizerQuality(model, networks)
        quality.update(images)
        report = quality.compute()
        assert (report.values["rfid_alexnet"] > 1.0) == far
        assert report.values["lpips_vgg"] == pytest.approx(shift, abs=1e-6)
        assert (report.values["ssim"] < 0.999) == far
        assert report.values["psnr"] == pytest.approx(20.0 if far else math.inf, rel=1e-4)


def test_clip_iqa_in_closed_form() -> None:
    """Cosines of (r, g, b) with the first two axes: e^(100·cos r) / (e^(100·cos r) + e^(100·cos g))."""
    colours = torch.tensor([[100, 99, 0], [10, 10, 200], [0, 255, 0]], dtype=torch.uint8)
    judge = ClipIqa(Encoder(), "clip_iqa_x")
    found = judge(colours[:, :, None, None].expand(3, 3, 4, 4))
    expected = []
    for r, g, b in colours.tolist():
        length = math.sqrt(r * r + g * g + b * b)
        expected.append(1 / (1 + math.exp(100 * (g - r) / length)))
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_clip_iqa_is_one_more_column(networks: QualityNetworks) -> None:
    judged = replace(networks, clip_iqa=ClipIqa(Encoder(), "clip_iqa_x"))
    quality = TokenizerQuality(RQVAE(SMALL).eval(), judged)
    quality.update(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert 0 <= quality.compute().values["clip_iqa_x"] <= 1


def test_a_missing_clip_is_named() -> None:
    with pytest.raises(UserError, match=r"--clip-iqa \./nowhere: no such folder"):
        load_clip_iqa("./nowhere")


# ---- the sheet --------------------------------------------------------------------------------------------------


def test_worst_pictures_come_first() -> None:
    def report(*psnrs: float) -> TokenizerReport:
        return TokenizerReport({}, {}, [{"psnr": value} for value in psnrs])

    assert worst_first({"a": report(30, 10, 20), "b": report(10, 29, 21)}) == [1, 0, 2]


def test_page_and_sheet_show_original_reconstruction_difference(
    tmp_path: Path, write: Write, data: Path, networks: QualityNetworks
) -> None:
    source, out = write("plain", 4), tmp_path / "out"
    main([str(source), "--data", str(data), "--worst", "2", "--out", str(out)])
    rows = read(out / "images.csv")[1:]
    order = np.argsort([float(row[2]) for row in rows])
    number = int(order[0])
    pictures = EvaluationImages([str(data)], 16, 100)
    image = torch.cat(list(pictures.batches(16)))[number]
    assert pictures.keys == [row[0] for row in rows]
    torch.manual_seed(4)
    found = reconstruct(RQVAE(SMALL).eval(), image[None])[0]
    wanted = [(image + 1) / 2, found, (4 * (found - (image + 1) / 2).abs()).clamp(0, 1)]
    sheet = np.asarray(Image.open(out / "worst.png")).astype(float) / 255
    side, margin = 128, 6  # 16 px, enlarged to 128
    for column, picture in enumerate(wanted):
        left = margin + column * (side + margin)
        shown = sheet[margin : margin + side : 8, left : left + side : 8]
        np.testing.assert_allclose(shown, picture.permute(1, 2, 0), atol=1 / 255)
    page = (out / "page.html").read_text()
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles == [rows[i][0] for i in order[:2]]  # worst first
    embedded = re.findall(r'src="data:image/png;base64,(.*?)"', page)
    assert len(embedded) == 6 and not re.findall(r'(?:src|href)="(?!data:|#)', page)  # needs no other file
    for content, picture in zip(embedded, wanted, strict=False):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(float) / 255
        np.testing.assert_allclose(shown, picture.permute(1, 2, 0), atol=1 / 255)
    assert ">psnr<" in page and "CLIP-IQA is skipped" in page


def test_the_page_names_the_tokenizer_of_each_number_and_keeps_markup_text(tmp_path: Path) -> None:
    names = ['<b>"one"</b>', "two & three"]
    reports = {
        name: TokenizerReport({"psnr": 1.0 + k}, {"perplexity": [3.0, 5.0 + k]}, [])
        for k, name in enumerate(names)
    }
    cells = [("original", "<i>caption</i>", Image.new("RGB", (4, 4)))]
    write_page(tmp_path / "page.html", reports, [Shown("<script>key", cells)], ["<u>note</u>"])
    page = (tmp_path / "page.html").read_text()
    cells = re.findall(r'<td data-label="(.*?)">(.*?)</td>', page)
    assert [(html.unescape(name), value) for name, value in cells] == [
        (names[0], "1.0000"), (names[1], "2.0000"), (names[0], "3.0000"), (names[1], "3.0000"), (names[0], "5.0000"),
        (names[1], "6.0000"),
    ]  # fmt: skip
    assert not re.search(r"<(b|i|u|script)\b", page)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
