"""The code of a model card that makes a model's input of an image file: `prepare(path) -> (1, C, H, W)`.

The library's own processor does it wherever that takes such pictures; else numpy and Pillow do, by the numbers in
`model.json`. The certificate runs the same code on files, so that a card is right or is not written.
"""

from dinoreg.export.source import Source

PROCESSORS = {
    "transformers": """from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained(".")


def prepare(path):
    return processor(read(path), return_tensors="pt")["pixel_values"]
""",
    "timm": """from timm.data import create_transform, resolve_data_config

transform = create_transform(**resolve_data_config(pretrained_cfg=saved["pretrained_cfg"]))
_, height, width = saved["pretrained_cfg"]["input_size"]


def center(image):  # timm's own crop rounds half a pixel to even, and this model's down
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


transform.transforms[1] = center


def prepare(path):
    return transform(read(path))[None]
""",
}

_READ_BYTES = """from PIL import Image, ImageOps


def read(path):  # upright, what is transparent on white
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("{mode}")
"""

_READ_TIFF = """import tifffile
from PIL import Image


def read(path):  # (H, W, C) of a TIFF, on the scale of bytes
    pixels = tifffile.imread(path)
    if pixels.ndim == 3 and pixels.shape[0] == {channels}:  # planes
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 2:  # grey
        pixels = np.stack([pixels] * {channels}, axis=-1)
{scale}    return pixels
"""

_SCALE = """    if {which}:
        low, high = {limits}
        scaled = (pixels - low) * (255 / (high - low))
        pixels = np.nan_to_num(scaled.clip(0, 255)).astype("float32")
"""

_PREPARE = """
stated = json.load(open("model.json"))["preprocessing"]


def prepare(path):
    pixels = np.atleast_3d(read(path))
    rows, columns, channels = pixels.shape
    short, size = stated["short_side"], stated["image_size"]
{shape}    filter = Image.Resampling[stated["interpolation"].upper()]
    bands = [Image.fromarray(pixels[:, :, c]).resize((width, height), filter) for c in range(channels)]
    top, left = (height - {height}) // 2, (width - {width}) // 2
    seen = np.stack(bands).clip(0, 255)[:, top : top + {height}, left : left + {width}] / 255
    mean, std = (np.reshape(stated[key], (-1, 1, 1)) for key in ("mean", "std"))
    return {result}
"""

_SQUARE = """    height, width = (short * side // min(rows, columns) for side in (rows, columns))
"""
_RECTANGLE = """    scale = short / min(size) * max(size[0] / rows, size[1] / columns)
    height, width = (max(side, round(old * scale)) for side, old in zip(size, (rows, columns)))
"""


def needs_tiff(source: Source) -> bool:
    """Whether the model's pictures are TIFF files, as Pillow has no such channels, or cuts such pixels."""
    return len(source.preprocessing.mean) not in (1, 3) or source.preprocessing.value_range is not None


def prepare_code(form: str, source: Source) -> str:
    """Python that defines `prepare`, for the folder of an artefact, after the code that loads it.

    form  name of the format
    """
    stated, channels = source.preprocessing, len(source.preprocessing.mean)
    read = _read_tiff(source) if needs_tiff(source) else _READ_BYTES.format(mode="L" if channels == 1 else "RGB")
    if form in PROCESSORS and not needs_tiff(source):
        return f"{read}\n\n{PROCESSORS[form]}"
    square = stated.size[0] == stated.size[1]
    height, width = ("size", "size") if square else ("size[0]", "size[1]")
    array = '((seen - mean) / std).astype("float32")[None]'
    result = array if form == "onnx" else f"torch.from_numpy({array})"
    shape = _SQUARE if square else _RECTANGLE
    code = f"import json\n\nimport numpy as np\n{read}\n{_PREPARE}"
    return (
        code.replace("{shape}", shape).replace("{height}", height).replace("{width}", width).replace("{result}", result)
    )


def _read_tiff(source: Source) -> str:
    """Code that reads the deeper pixels of a data set; bytes keep their scale unless the range is meant for them."""
    limits = source.preprocessing.value_range
    which, numbers = 'pixels.dtype != "uint8"', '0, np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1'
    if limits is not None:
        which = which if max(limits.high) > 255 else "True"
        numbers = 'np.array(stated["range"][::2]), np.array(stated["range"][1::2])'
    scale = _SCALE.format(which=which, limits=numbers)
    return _READ_TIFF.format(channels=len(source.preprocessing.mean), scale=scale)
