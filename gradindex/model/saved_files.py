"""The files of a saved model: which of them are its weights, and what is wrong with them."""

import json
from pathlib import Path

import safetensors

from gradindex.errors import InputError

WEIGHTS, SHARDS = SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # in transformers' order, all four
POINTER = b"version https://git-lfs"  # what Git leaves of a large file that wasn't fetched

Shapes = dict[str, tuple[int, ...]]


def check_path(folder: Path) -> None:
    """Raise InputError for a file, or for what can be no hub id and isn't there."""
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2):
        raise InputError(f"the model {folder} can't be loaded: there is no such folder. Expected "
                         f"one with config.json and {WEIGHTS}, as save_pretrained writes it.")
    if folder.is_file():
        raise InputError(f"the model {folder} is a file; expected a folder with config.json and "
                         f"{WEIGHTS}, as save_pretrained writes it. Give that folder.")


def check_folder(folder: Path) -> None:
    """Raise InputError for a folder without a model's configuration."""
    if folder.is_dir() and not (folder / "config.json").exists():
        missing = "its weights lie there without config.json. Copy that file beside them." \
            if any((folder / name).exists() for name in SAFE) else _instead(folder)
        raise InputError(f"the model {folder} can't be loaded: {missing}")


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files of the weights that a folder holds, each there and whole, safetensors first.

    Raises InputError with what is wrong with them.
    """
    forms = (*SAFE, *PICKLED) if allow_pickle else SAFE
    form = next((name for name in forms if (folder / name).exists()), None)
    if form is None:
        raise InputError(f"the model {folder} can't be loaded: {_instead(folder)}")
    files = _shards(folder, form) if form.endswith(".json") else [folder / form]
    for file in files:
        check_weights(file)
    return files


def _shards(folder: Path, form: str) -> list[Path]:
    """The files that a list of shards names. Raises InputError where one isn't there."""
    try:
        named = json.loads((folder / form).read_text())["weight_map"].values()
        names = sorted({Path(name).name for name in named})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # JSON of any form at all
        names = []
    if not names:
        raise InputError(
            f"the model {folder} can't be loaded: {form} doesn't say which file holds which "
            "tensor (weight_map). Copy it again from where the model is whole."
        )
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise InputError(
            f"the model {folder} can't be loaded: {len(absent)} of its {len(names)} files of "
            f"weights are missing: {', '.join(absent[:3])}{', …' * (len(absent) > 3)}. Copy or "
            "download them again."
        )
    return [folder / name for name in names]


def check_weights(file: Path) -> None:
    """Raise InputError, with the reason, for a file of weights that can't be read."""
    wrong, fix = "", "Copy or download it again"
    try:
        with file.open("rb") as opened:
            start = opened.read(len(POINTER))
        if not start:
            wrong = "is empty"
        elif start == POINTER:
            wrong, fix = "is Git LFS's note of a file that wasn't fetched", "Run git lfs pull there"
        elif file.suffix == ".safetensors":
            with safetensors.safe_open(file, framework="pt"):  # reads the head and checks the size
                return
    except OSError as error:
        wrong, fix = f"can't be read ({error.strerror or error})", "Look at its permissions"
    except safetensors.SafetensorError as error:
        wrong = f"is damaged or cut short ({error})"
    if wrong:
        raise InputError(f"{file} {wrong}; expected a model's weights. {fix}.")


def _instead(folder: Path) -> str:
    """What a folder without safetensors weights of a model holds, and what to do."""
    def there(*patterns: str) -> str:
        """The first file that matches one of the patterns, by name, or nothing."""
        return next((path.name for pattern in patterns for path in sorted(folder.glob(pattern))),
                    "")

    convert = "Load it with transformers and save it with save_pretrained"
    # what tells most comes first: a trainer leaves its own files beside those of a whole model
    if name := there("pytorch_model*.bin"):
        return f"its weights are pickled ({name}), and unpickling can run code. Convert them to " \
               "safetensors, or pass --allow-pickle if you trust the file."
    if name := there("adapter_model.*"):
        return f"it holds the weights of an adapter ({name}) without adapter_config.json. Copy " \
               "that file beside them."
    if name := there("*.gguf", "tf_model*.h5", "flax_model*.msgpack", "*.onnx", "onnx/*.onnx",
                     "consolidated*", "*.pth", "*.ckpt"):
        return f"its weights are in another form ({name}); expected {WEIGHTS}. {convert}."
    if name := there("zero_to_fp32.py", "global_step*", "pytorch_model_fsdp*", "*.distcp"):
        return f"it is a training checkpoint in pieces ({name}); expected {WEIGHTS}. Put the " \
               "pieces together with the tool of the trainer that wrote them (zero_to_fp32.py, " \
               "accelerate merge-weights)."
    if name := there("*.safetensors"):
        return f"it holds {name}, but neither {WEIGHTS} nor {SHARDS}, which says what file holds " \
               "which tensor. Copy it again, with all its files."
    patterns = ("*/model*.safetensors", "*/adapter_config.json")
    inner = sorted({path.parent.name for pattern in patterns for path in folder.glob(pattern)})
    if inner:
        return f"it holds no weights itself, its folders do ({', '.join(inner[:5])}). Give one " \
               "of them."
    if name := there("optimizer.pt", "trainer_state.json", "training_args.bin", "scheduler.pt"):
        return f"it holds what a trainer goes on with ({name}), and no weights. Give the folder " \
               "that the trained model was saved to."
    return f"it holds no weights. Expected a folder with config.json and {WEIGHTS}, as " \
           "save_pretrained writes it."


def tensor_shapes(files: list[Path]) -> Shapes:
    """The shape of every tensor in some safetensors files, by name."""
    shapes: Shapes = {}
    for path in files:
        with safetensors.safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape())
                       for name in file.keys()}  # noqa: SIM118
    return shapes
