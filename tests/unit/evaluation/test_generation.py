"""Numbered generation: the same bytes whoever makes them, complete or refused."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from evaluation.generation import work_of
from evaluation.image_shards import read_unit, stamp_of
from evaluation.prompt_sets import KNOWN, load_prompt_set, seed_of
from experiments.generate import main
from switti.errors import UserError

STUB = "stub_system:Stub"


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text("".join(f"thing {number}\n" for number in range(300)))
    return path


def generate(out: Path, prompts: Path, *more: str, system: str = STUB) -> None:
    assert main([system, "--prompts", str(prompts), "--out", str(out), *more]) == 0


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def command(out: Path, prompts: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "experiments.generate", STUB, "--prompts", str(prompts), "--out", str(out), *more,
    ]  # fmt: skip


def environment(root: Path, **more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{root}:{root / 'tests/helpers'}"} | more


class TestShards:
    def test_every_image_lies_under_its_number_with_its_prompt_and_seed(self, tmp_path, prompts):
        generate(tmp_path / "out", prompts, "--images-per-prompt", "2", "--batch", "7")
        images = [i for path in sorted((tmp_path / "out").glob("*.tar")) for i in read_unit(path)]
        assert [image.key for image in images] == [f"{n:06d}-{k:02d}" for n in range(300) for k in range(2)]
        some = images[411]
        assert some.meta["prompt"] == "thing 205"
        assert some.meta["seed"] == seed_of("some", 205, 1)
        assert some.meta["settings"] == {"version": 1}

    def test_seeds_are_a_stable_hash_of_set_index_and_ordinal(self):
        digest = hashlib.sha256(b"coco/12/3").digest()
        assert seed_of("coco", 12, 3) == int.from_bytes(digest[:8], "big") // 2

    def test_webdataset_reads_them(self, tmp_path, prompts):
        import webdataset

        generate(tmp_path / "out", prompts)
        path = str(tmp_path / "out" / "images-000000.tar")
        samples = list(webdataset.WebDataset(path, shardshuffle=False, empty_check=False))
        assert len(samples) == 256
        assert {"png", "txt", "json"} <= samples[0].keys()

    @pytest.mark.parametrize("place", [700, 5000, 40_000])
    def test_a_flipped_bit_is_found(self, tmp_path, prompts, place):
        generate(tmp_path / "out", prompts)
        path = tmp_path / "out" / "images-000000.tar"
        content = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            member = next(m for m in tar if m.name.endswith(".png") and m.offset_data + m.size > place)
        content[member.offset_data + member.size // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is corrupt: .* is not the image that was written"):
            list(read_unit(path))

    def test_a_shard_that_was_cut_off_is_made_again(self, tmp_path, prompts):
        out = tmp_path / "out"
        generate(out, prompts)
        before = contents(out)
        path = out / "images-000001.tar"
        path.write_bytes(path.read_bytes()[:-10_240])
        assert stamp_of(path) is None
        generate(out, prompts)
        assert contents(out) == before


class TestWorkers:
    @pytest.mark.slow
    def test_three_workers_make_the_bytes_of_one(self, tmp_path, prompts, root):
        generate(tmp_path / "one", prompts, "--images-per-prompt", "4")
        run = subprocess.run(
            command(tmp_path / "three", prompts, "--images-per-prompt", "4", "--workers", "3"),
            env=environment(root), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert contents(tmp_path / "three") == contents(tmp_path / "one")

    @pytest.mark.slow
    def test_workers_killed_at_random_moments_leave_no_trace(self, tmp_path, prompts, root):
        more = ("--images-per-prompt", "6")
        generate(tmp_path / "one", prompts, *more)
        chance, out, killed = random.Random(7), tmp_path / "killed", 0
        for attempt in range(20):
            workers = str(1 + attempt % 3)
            child = subprocess.Popen(
                command(out, prompts, *more, "--workers", workers),
                env=environment(root, STUB_SECONDS="0.002"), start_new_session=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            time.sleep(chance.uniform(0.3, 2.5))
            killed += child.poll() is None
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        generate(out, prompts, *more)
        assert killed > 5
        assert contents(out) == contents(tmp_path / "one")
        assert not list(out.glob(".*.tmp"))

    @pytest.mark.slow
    def test_a_job_array_makes_the_same_bytes(self, tmp_path, prompts, root, monkeypatch, capsys):
        pytest.importorskip("submitit")
        from fake_slurm import install

        programs = install(tmp_path / "cluster")
        for name, value in environment(root, FAKE_SLURM=str(tmp_path / "cluster")).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        generate(tmp_path / "one", prompts)
        generate(tmp_path / "out", prompts, "--launcher", "slurm", "--workers", "2", "--gpus", "0")
        assert "2 workers submitted" in capsys.readouterr().out
        end = time.monotonic() + 60
        while time.monotonic() < end and contents(tmp_path / "out") != contents(tmp_path / "one"):
            time.sleep(0.2)
        assert contents(tmp_path / "out") == contents(tmp_path / "one")


class TestRefusals:
    def test_a_folder_of_other_images_stays_as_it_is(self, tmp_path, prompts):
        generate(tmp_path / "out", prompts)
        before = contents(tmp_path / "out")
        with pytest.raises(UserError, match=r"holds other images \(prompts.images_per_prompt was 1, now 2"):
            generate(tmp_path / "out", prompts, "--images-per-prompt", "2")
        assert contents(tmp_path / "out") == before

    def test_a_dry_run_says_what_is_missing(self, tmp_path, prompts, capsys):
        generate(tmp_path / "out", prompts)
        (tmp_path / "out" / "images-000000.tar").unlink()
        generate(tmp_path / "out", prompts, "--dry-run")
        assert "44 of 300 images of Stub; 256 to make (images-000000.tar)" in capsys.readouterr().out

    def test_a_system_that_returns_too_few_images_is_stopped(self, tmp_path, prompts):
        with pytest.raises(UserError, match="Failing returned 0 images for 8 prompts"):
            generate(tmp_path / "out", prompts, system="stub_system:Failing")
        assert not list((tmp_path / "out").glob("*.tar"))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["a", "b"], "give one SYSTEM, not 2"),
            (["folder:nowhere"], "there is no such folder"),
            (["stub_system:Nothing"], "has no Nothing"),
            ([STUB, "guidance=3"], "takes no settings"),
            (["nowhere at all"], "neither a run, a checkpoint, an exported folder nor a hub id"),
        ],
    )
    def test_what_is_no_system_is_named(self, tmp_path, prompts, words, message):
        with pytest.raises(UserError, match=message):
            main([*words, "--prompts", str(prompts), "--out", str(tmp_path / "out")])


class TestFolders:
    def folder(self, path: Path, names: list[str]) -> Path:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (len(name), 0, 0)).save(path / name)
        return path

    @pytest.mark.parametrize(
        "form", ["{0}.png", "{0:06d}.jpg", "{0:06d}-00.webp", "{0:05d}/samples/0000.png"]
    )
    def test_images_from_elsewhere_keep_their_bytes(self, tmp_path, form):
        prompts = tmp_path / "three.txt"
        prompts.write_text("a\nb\nc\n")
        folder = self.folder(tmp_path / "made", [form.format(n) for n in range(3)])
        generate(tmp_path / "out", prompts, system=f"folder:{folder}")
        (image, *_) = read_unit(tmp_path / "out" / "images-000000.tar")
        assert image.content == (folder / form.format(0)).read_bytes()

    def test_an_incomplete_set_does_not_pass(self, tmp_path):
        prompts = tmp_path / "geneval.txt"
        prompts.write_text("a\nb\n" * 20)
        prompts = prompts.rename(tmp_path / "forty.txt")
        names = [f"{n:05d}/samples/{k:04d}.png" for n in range(40) for k in range(4)]
        folder = self.folder(tmp_path / "made", names[:-3])
        with pytest.raises(UserError, match=r"images for 157 of 160 .*; missing: 000039-01, 000039-02"):
            generate(tmp_path / "out", prompts, "--images-per-prompt", "4", system=f"folder:{folder}")

    def test_two_files_of_one_number_are_refused(self, tmp_path):
        prompts = tmp_path / "one.txt"
        prompts.write_text("a\n")
        folder = self.folder(tmp_path / "made", ["0.png", "000000-00.png"])
        with pytest.raises(UserError, match="are both image 0-0"):
            generate(tmp_path / "out", prompts, system=f"folder:{folder}")


class TestPromptSets:
    @pytest.mark.parametrize(
        ("name", "text", "more"),
        [
            ("a.csv", "id,caption\n1,a dog\n2,\"a cat, asleep\"\n", {"id": "1"}),
            ("a.tsv", "Prompt\tCategory\na dog\tAnimals\na cat, asleep\tAnimals\n", {"Category": "Animals"}),
            ("a.jsonl", '{"prompt": "a dog", "tag": "x"}\n{"prompt": "a cat, asleep", "tag": "y"}\n', {"tag": "x"}),
            ("a.json", '{"k1": {"prompt": "a dog"}, "k2": {"prompt": "a cat, asleep"}}', {"id": "k1"}),
            ("a.json", '["a dog", "a cat, asleep"]', {}),
            ("a.txt", "a dog\n\na cat, asleep\n", {}),
        ],
    )  # fmt: skip
    def test_each_format_is_read(self, tmp_path, name, text, more):
        (tmp_path / name).write_text(text)
        prompts = load_prompt_set(str(tmp_path / name))
        assert prompts.texts == ("a dog", "a cat, asleep")
        assert prompts.details[0] == more

    def test_captions_of_shards_are_prompts(self, tmp_path):
        from data_shards import make_shard

        make_shard(tmp_path / "data" / "train-000000.tar", ["a"])
        make_shard(tmp_path / "data" / "validation-000000.tar", ["b", "c"])
        assert load_prompt_set(str(tmp_path / "data")).texts == ("caption b", "caption c")

    def test_the_counts_of_a_published_set_are_checked(self, tmp_path):
        rows = [{"prompt": f"p {n}", "tag": "counting"} for n in range(553)]
        path = tmp_path / "geneval.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-9]))
        with pytest.raises(UserError, match="has 544 prompts, but geneval has 553"):
            load_prompt_set(str(path))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match="has tags"):
            load_prompt_set(str(path))
        tags = [tag for tag, count in KNOWN["geneval"].tags.items() for _ in range(count)]
        path.write_text(
            "".join(json.dumps(row | {"tag": tag}) + "\n" for row, tag in zip(rows, tags, strict=True))
        )
        assert len(load_prompt_set(str(path))) == 2212

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.csv", "id,picture\n1,x\n", "none of its columns .* is called prompt, caption"),
            ("a.csv", "id,prompt\n1,\n", "row 2 has no prompt"),
            ("a.jsonl", '{"prompt": "a"}\nnonsense\n', "line 2 is not JSON"),
            ("a.json", "3", "holds a int"),
            ("a.txt", "\n", "holds no prompt"),
            ("a.doc", "x", "must end in"),
        ],
    )
    def test_a_bad_file_is_refused_in_one_line(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            load_prompt_set(str(tmp_path / name))
        assert "\n" not in str(caught.value)

    def test_a_known_set_that_is_not_there_says_where_to_get_it(self):
        with pytest.raises(
            UserError, match=r"put eval_prompts/coco.csv of github.com/yandex-research/switti"
        ):
            load_prompt_set("coco")

    def test_a_column_of_another_name_can_be_given(self, tmp_path):
        (tmp_path / "a.csv").write_text("id,words\n1,hello\n")
        assert load_prompt_set(str(tmp_path / "a.csv"), column="words").texts == ("hello",)
        with pytest.raises(UserError, match=r"--prompt-column word: .*words"):
            load_prompt_set(str(tmp_path / "a.csv"), column="word")


def test_the_last_unit_is_smaller(tmp_path):
    manifest = {"prompts": {"count": 300, "images_per_prompt": 2}, "unit": 256, "digest": "d"}
    assert work_of(tmp_path, manifest).sizes == (256, 256, 88)
