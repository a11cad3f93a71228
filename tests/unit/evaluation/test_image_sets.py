"""Scores of generated images: kept unit by unit, reduced with intervals, compared on the same prompts."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.linalg
import torch
from torch import nn

from evaluation.image_sets import evaluate_image_sets
from evaluation.image_shards import read_unit
from evaluation.numbered_work import Worker, do_units
from evaluation.references import Reference, load_reference, save_reference
from evaluation.scoring import (
    feature_maker,
    feature_work,
    open_image_set,
    read_features,
    read_scores,
    score_maker,
    score_work,
)
from evaluation.statistics import (
    FeatureStatistics,
    frechet_distance,
    mean_over_prompts,
    paired_difference,
    statistics_of,
)
from evaluation.tables import Row, latex, markdown, published_rows
from experiments import evaluate, generate, reference_stats
from switti.errors import UserError
from switti.metrics.catalogue import IMAGE_METRICS
from switti.metrics.config import MetricsConfig
from switti.metrics.fid import kernel_distance

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def images(tmp_path) -> Path:
    """300 prompts, two images each, in three units."""
    (tmp_path / "some.txt").write_text("".join(f"thing {n}\n" for n in range(300)))
    words = ["stub_system:Stub", "--prompts", "some.txt", "--images-per-prompt", "2", "--out", "made"]
    generate.main(words)
    return tmp_path / "made"


def redness(tensor: torch.Tensor, captions: list[str]) -> torch.Tensor:
    return tensor[:, 0].double().mean((1, 2)) + torch.tensor([float(c.split()[1]) for c in captions])


def score(folder: Path, batch: int = 16):
    images = open_image_set(folder)
    work = score_work(images, "redness", "1")
    do_units(work, score_maker(images, redness, ["redness"], work, batch, "cpu"))
    return work


class TestScores:
    def test_every_image_has_a_row_with_the_value_of_the_stored_image(self, images):
        work = score(images)
        table = pq.read_table(work.path(1)).to_pydict()
        stored = list(read_unit(images / "images-000001.tar"))
        assert table["key"] == [image.key for image in stored]
        from datamodules.images import decode

        for image, value in zip(stored[:5], table["redness"], strict=False):
            red = np.asarray(decode(image.content))[..., 0].mean()
            assert value == pytest.approx(red + image.meta["index"])

    def test_the_batch_changes_no_byte(self, images, tmp_path):
        first = [score(images).path(unit).read_bytes() for unit in range(3)]
        for path in (images / "scores").glob("*.parquet"):
            path.unlink()
        assert [score(images, batch=7).path(unit).read_bytes() for unit in range(3)] == first

    def test_what_is_there_is_not_computed_again(self, images):
        score(images)
        images_set = open_image_set(images)
        work = score_work(images_set, "redness", "1")

        def never(tensor, captions):
            raise AssertionError

        do_units(work, score_maker(images_set, never, ["redness"], work, 16, "cpu"))

    def test_scores_of_other_images_are_refused(self, images):
        work = score(images)
        other = score_work(open_image_set(images), "redness", "2")
        with pytest.raises(UserError, match=r"redness-000000.parquet was made by other work"):
            other.missing()
        assert work.missing() == []

    def test_an_incomplete_set_is_not_scored(self, images):
        (images / "images-000001.tar").unlink()
        with pytest.raises(UserError, match=r"has 344 of 600 images of Stub; run its experiments.generate"):
            open_image_set(images)

    def test_a_corrupt_shard_is_set_aside_and_made_again(self, images):
        path = images / "images-000001.tar"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"moved to images-000001.tar.corrupt: run the experiments.generate"
        ):
            score(images)
        generate.main(
            ["stub_system:Stub", "--prompts", "some.txt", "--images-per-prompt", "2", "--out", str(images)]
        )
        assert score(images).missing() == []

    def test_a_value_that_is_undefined_for_some_prompts_is_averaged_over_the_others(self, images):
        opened = open_image_set(images)
        work = score_work(opened, "odd", "1")

        def odd(tensor, captions):
            numbers = torch.tensor([float(c.split()[1]) for c in captions])
            return torch.stack([numbers, torch.where(numbers % 2 == 1, numbers, torch.nan)], dim=1)

        do_units(work, score_maker(opened, odd, ["odd", "odds"], work, 16, "cpu"))
        assert read_scores(work, "odd").mean_P.tolist() == list(range(300))
        assert read_scores(work, "odds").index_P.tolist() == list(range(1, 300, 2))


class TestStatistics:
    def test_the_interval_covers_the_mean_as_often_as_it_says(self):
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(200):
            found = mean_over_prompts(rng.normal(3, 2, 150))
            hits += found.low < 3 < found.high
        assert 180 <= hits <= 198

    def test_pairing_removes_what_the_prompts_have_in_common(self):
        rng = np.random.default_rng(1)
        prompts = rng.normal(0, 10, 400)
        a, b = prompts + rng.normal(0, 0.1, 400), prompts + 0.05 + rng.normal(0, 0.1, 400)
        difference = paired_difference(a, b)
        assert difference.low > 0
        assert difference.high - difference.low < 0.05 < mean_over_prompts(a).high - mean_over_prompts(a).low

    def test_values_that_are_not_finite_are_refused(self):
        with pytest.raises(UserError, match="not finite"):
            mean_over_prompts(np.array([1.0, np.nan]))

    @pytest.mark.parametrize("rank", [5, 40])
    def test_the_frechet_distance_is_that_of_scipy(self, rank):
        rng = np.random.default_rng(2)
        sides = [rng.normal(size=(60, rank)) @ rng.normal(size=(rank, 12)) + k for k in range(2)]
        a, b = map(statistics_of, sides)
        assert np.allclose(a.covariance_FF, np.cov(sides[0].T))
        root = scipy.linalg.sqrtm(a.covariance_FF @ b.covariance_FF).real
        expected = ((a.mean_F - b.mean_F) ** 2).sum() + np.trace(a.covariance_FF + b.covariance_FF - 2 * root)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6 if rank > 12 else 1e-3)

    def test_the_kernel_distance_by_blocks_is_the_sum_over_pairs(self, monkeypatch):
        monkeypatch.setattr("switti.metrics.fid.BLOCK", 7)
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (20, 31))

        def kernel(x, y):
            return (x @ y.T / 6 + 1) ** 3

        within = [
            (kernel(x, x).sum() - kernel(x, x).diagonal().sum()) / (len(x) * (len(x) - 1)) for x in (a, b)
        ]
        expected = float(sum(within) - 2 * kernel(a, b).mean())
        assert float(kernel_distance(a, b)) == pytest.approx(expected, rel=1e-12)
        assert float(kernel_distance(a, b, torch.float32)) == pytest.approx(expected, abs=1e-6)


class TestReferences:
    def made(self, network: str = "alexnet", digest: str = "") -> Reference:
        features = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
        return Reference(network, digest, statistics_of(features), features, "here")

    def test_a_file_says_what_it_is_of(self, tmp_path):
        save_reference(tmp_path / "a.npz", self.made())
        back = load_reference(tmp_path / "a.npz")
        assert (back.network, back.statistics.count, back.source) == ("alexnet", 50, "here")
        np.testing.assert_array_equal(back.statistics.covariance_FF, self.made().statistics.covariance_FF)

    def test_the_published_files_hold_mean_and_covariance(self, tmp_path):
        np.savez(tmp_path / "fid_stats_mscoco256_val.npz", mu=np.zeros(3), sigma=np.eye(3))
        reference = load_reference(tmp_path / "fid_stats_mscoco256_val.npz")
        assert frechet_distance(
            reference.statistics, FeatureStatistics(np.ones(3), np.eye(3), 9)
        ) == pytest.approx(3)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"mu": np.zeros(3)}, "not a file of statistics"),
            ({"mu": np.zeros(3), "sigma": np.eye(2)}, "do not fit"),
            ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path, content, message):
        np.savez(tmp_path / "a.npz", **content)
        with pytest.raises(UserError, match=message):
            load_reference(tmp_path / "a.npz")

    def test_nothing_in_a_file_is_unpickled(self, tmp_path):
        np.savez(tmp_path / "a.npz", mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))
        with pytest.raises(UserError, match="not a file of statistics"):
            load_reference(tmp_path / "a.npz")

    @pytest.mark.parametrize(
        ("reference", "message"),
        [
            (None, "fid_alexnet needs statistics of real images under alexnet .given: none"),
            ({"network": "inception_clean"}, "given: inception_clean"),
            ({"network": ""}, "given: unnamed"),
            ({"digest": "other"}, "was made with another network file"),
        ],
    )
    def test_a_distance_under_another_convention_is_refused(self, images, reference, message):
        given = [] if reference is None else [self.made(**reference)]
        with pytest.raises(UserError, match=message):
            evaluate_image_sets([images], MetricsConfig(names=["fid_alexnet"]), given, Worker())


def test_features_are_stored_with_their_digest(images):
    opened = open_image_set(images)
    work = feature_work(opened, "mean", "1")
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    do_units(work, feature_maker(opened, lambda x: network(x.float()), work, 32, "cpu"))
    features = read_features(work)
    assert features.shape == (600, 3)
    assert 100 < float(features.mean()) < 155


class TestTables:
    def rows(self) -> list[Row]:
        from evaluation.statistics import Estimate

        values = [0.3, 0.5, 0.4, 0.2]
        return [
            Row(f"system_{n}", {"image_reward": Estimate(v, v - 0.01, v + 0.01, 9)}, {})
            for n, v in enumerate(values)
        ]

    def test_the_best_three_are_marked(self):
        infos = {"image_reward": IMAGE_METRICS["image_reward"]}
        text = markdown(self.rows(), infos, "note")
        assert "| system_1 | 0.5000 ± 0.0100¹ |" in text
        assert "| system_2 | 0.4000 ± 0.0100² |" in text
        assert "| system_0 | 0.3000 ± 0.0100³ |" in text
        assert "| system_3 | 0.2000 ± 0.0100 |" in text
        assert r"system\_1 & \textbf{0.5000\,$\pm$\,0.0100} \\" in latex(self.rows(), infos)

    def test_published_numbers_stand_beside_the_same_protocol_alone(self):
        labels = ["image_reward", "mini_clip_score"]
        (row, *_) = [
            r for r in published_rows({"name": "coco", "count": 30_000}, labels) if "Switti 512" in r.name
        ]
        assert row.values["image_reward"].value == 0.95
        assert set(row.values) == {"image_reward"}
        assert published_rows({"name": "coco", "count": 100}, labels) == []
        assert published_rows({"name": "emoji64", "count": 30_000}, labels) == []


class TestCommand:
    def test_images_are_scored_compared_and_described(self, images, tmp_path, monkeypatch, capsys):
        (tmp_path / "real").mkdir()
        generate.main(["stub_system:Stub", "--prompts", "some.txt", "--limit", "40", "--out", "a"])
        generate.main(["stub_system:Inverted", "--prompts", "some.txt", "--limit", "40", "--out", "b"])
        for image in list(read_unit(Path("a/images-000000.tar")))[:30]:
            (tmp_path / "real" / f"{image.key}.png").write_bytes(image.content)
        reference_stats.main(["real", "--network", "alexnet", "--out", "real.npz"])
        metrics = "fid_alexnet,kid_alexnet,mini_clip_score,mini_clip_top1"
        assert (
            evaluate.main(["a", "b", "--metrics", metrics, "--reference", "real.npz", "--out", "table"]) == 0
        )
        content = json.loads(Path("b/evaluation.json").read_text())
        # The captions name no style.
        assert set(content["metrics"]) == {*metrics.split(","), "mini_clip_top1_all"}
        assert content["metrics"]["mini_clip_score"]["low"] < content["metrics"]["mini_clip_score"]["value"]
        assert content["differences"]["against"] == "Stub"
        assert content["about"]["mini_clip_score"]["better"] == "higher"
        assert "Inverted" in Path("table/table.md").read_text()
        assert "Inverted − Stub" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["made"], "--metrics NAME,… says what to measure"),
            (["made", "--metrics", "fid"], "no metric 'fid'"),
            (["made", "--metrics", "mini_clip_score", "guidance=3"], "images are there already"),
            (["made", "--metrics", "mini_clip_score", "--data", "x"], "--data is for generators"),
            (
                ["made", "other", "--metrics", "mini_clip_score"],
                "made holds generated images and other does not",
            ),
        ],
    )
    def test_what_does_not_go_together_is_said(self, images, words, message):
        with pytest.raises(UserError, match=message):
            evaluate.main(words)

    def test_systems_of_different_prompts_are_not_compared(self, images, tmp_path):
        generate.main(["stub_system:Stub", "--prompts", "some.txt", "--out", "other"])
        with pytest.raises(
            UserError, match=r"with other prompts or another number of images; .* evaluate them apart"
        ):
            evaluate.main(["made", "other", "--metrics", "mini_clip_score"])
