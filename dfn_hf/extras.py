"""The optional packages, and the extra of dfn-hf that installs each."""

EXTRA_OF = {
    "bitsandbytes": "quantization",
    "datasets": "train",
    "fastapi": "serve",
    "fsspec": "train",
    "lm_eval": "clients",
    "matplotlib": "plot",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "PIL": "fields",
    "sacrebleu": "eval",
    "sentence_transformers": "clients",
    "skimage": "fields",
    "sklearn": "fields",
    "tensorboard": "train",
    "torchao": "quantization",
    "trl": "clients",
    "uvicorn": "serve",
}


def missing_extra(error: ImportError) -> str | None:
    """One sentence that says how to install the package that an import lacked; None if it belongs to no extra."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA_OF:
        return None
    return f"{package} is not installed: run pip install 'dfn-hf[{EXTRA_OF[package]}]'"
