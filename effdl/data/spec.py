"""Where samples come from and how they become numbers, as a recipe or the command line says it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from effdl.errors import UsageError, nearest

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Pixels = Annotated[int, Field(ge=1)]
Three = Annotated[list[float], Field(min_length=1, max_length=4)]


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Preprocess(_Part):
    """How a picture becomes an array: resize, crop, then (pixel * scale - mean) / std."""

    preset: Literal["imagenet", "unit", "signed", "raw"] = "unit"
    """imagenet: centre crop, its mean and std. unit: 0 to 1. signed: -1 to 1. raw: 0 to 255."""
    size: Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)] | None = None
    """Side in pixels, or [height, width]; the model's own where it is fixed."""
    resize: Literal["stretch", "crop", "letterbox", "none"] | None = None
    """stretch to the size; crop the middle; letterbox: keep proportions and fill up; or none."""
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """With resize crop: the share of the shorter side that is kept; 0.875 is 224 of 256."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    """How pixels are computed when the picture is resized."""
    fill: Annotated[int, Field(ge=0, le=255)] = 114
    """Grey value that letterbox fills up with."""
    place: Literal["centre", "corner"] = "centre"
    """Where letterbox puts the picture: in the middle, or in the upper left corner."""
    color: Literal["RGB", "BGR", "grey"] | None = None
    """Order of the channels; RGB, or grey for a model with one channel."""
    scale: float | None = None
    """Factor of the pixels 0..255."""
    mean: float | Three | None = None
    """Subtracted after scaling, one number or one per channel."""
    std: Annotated[float, Field(gt=0)] | Three | None = None
    """Divided by at last, one number or one per channel."""
    layout: Literal["NCHW", "NHWC"] | None = None
    """Order of the axes; read from the model's input where it can be."""


class Source(_Part):
    """Samples: a file or folder, and how they become the model's inputs."""

    path: Path
    """An .npz, a folder of .npy, a folder of pictures, or a .csv with texts."""
    preprocess: Text | Preprocess | None = None
    """For pictures: a preset such as imagenet, or a mapping with size, mean, std."""
    tokenizer: Path | None = None
    """For texts: a tokenizer.json."""
    text: Text | list[Text] | None = None
    """For texts: the column, or the two columns of a pair: names, or numbers from 1 without a header line."""
    length: Annotated[int, Field(ge=1)] | None = None
    """For texts: cut after this many tokens."""
    pairs: Literal["joined", "cosine"] | None = None
    """Two texts: joined in one input, or each on its own and scored by the cosine of their embeddings."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many samples, spread evenly over all."""

    @field_validator("preprocess")
    @classmethod
    def _readable(cls, value: str | Preprocess | None) -> str | Preprocess | None:
        if isinstance(value, str):
            try:
                parse_preprocess(value)
            except UsageError as e:
                raise ValueError(f"{e.message} ({e.hint})" if e.hint else e.message) from None
        return value

    @field_validator("text")
    @classmethod
    def _columns(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and not 1 <= len(value) <= 2:
            raise ValueError("one column, or the two of a pair")
        return value


class Labelled(Source):
    """Labelled samples and what is computed on them."""

    metric: Text = "top1"
    """What is computed, see ``data.metrics``."""
    labels: Text | None = None
    """An array of the file, a column of the .csv, or a file; 'label', or the folders of pictures."""


def embeds_pairs(spec: Source) -> bool:
    """Whether two texts are embedded each on its own: what spearman wants unless told otherwise."""
    two = isinstance(spec.text, list) and len(spec.text) == 2
    if isinstance(spec.text, str):
        two = spec.text.count(",") == 1
    wanted = isinstance(spec, Labelled) and spec.metric == "spearman"
    return two and (spec.pairs == "cosine" or (spec.pairs is None and wanted))


def parse_labelled(**options: Any) -> Labelled:
    """Make a Labelled of options that may be None.

    Raises:
        UsageError: one of them does not fit; names it.
    """
    given = {k: v for k, v in options.items() if v is not None}
    preprocess = given.get("preprocess")
    if isinstance(preprocess, str):
        parse_preprocess(preprocess)
    try:
        return Labelled(**given)
    except ValidationError as e:
        fault = e.errors(include_url=False)[0]
        key = str(fault["loc"][0])
        message = str(fault["msg"]).removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        raise UsageError(f"{key} cannot be '{given.get(key)}': {message}") from None


def parse_preprocess(spec: str) -> Preprocess:
    """Read ``imagenet,size=224`` or ``raw,size=240x320,color=BGR,mean=127/127/127``.

    A preset's name comes first; then KEY=VALUE, where ``x`` parts height from width and ``/`` the
    channels.

    Raises:
        UsageError: an unknown preset or key, or a value that does not fit.
    """
    parts = [p.strip() for p in spec.split(",") if p.strip()]
    options: dict[str, Any] = {}
    if parts and "=" not in parts[0]:
        options["preset"] = parts.pop(0)
    for part in parts:
        key, sign, text = (p.strip() for p in part.partition("="))
        if not sign or key not in Preprocess.model_fields:
            hint = nearest(key, Preprocess.model_fields)
            raise UsageError(f"preprocessing '{spec}': unknown key '{key}'", hint=hint)
        options[key] = _value(text)
    try:
        return Preprocess(**options)
    except ValidationError as e:
        fault = e.errors(include_url=False)[0]
        key = str(fault["loc"][0])
        got = options[key]
        wanted = str(fault["ctx"]["expected"]) if "expected" in fault.get("ctx", {}) else ""
        hint = nearest(str(got), wanted.split("'")[1::2]) if wanted else fault["msg"]
        raise UsageError(f"preprocessing '{spec}': {key} cannot be '{got}'", hint=hint) from None


def _value(text: str) -> Any:
    for sign in "/x":
        if sign in text and all(_is_number(p) for p in text.split(sign)):
            return [_number(p) for p in text.split(sign)]
    return _number(text) if _is_number(text) else text


def _number(text: str) -> int | float:
    return int(text) if text.strip().isdigit() else float(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
