"""Keeps notices of libraries, which are not about the user's command, out of its output."""

import logging
import sys

from ..hub.import_hook import when_imported

# Packages that transformers imports if they are installed, and what they log on import. The loggers' other messages
# are kept.
IMPORT_NOTICES = {
    "torchao": "Failed to load ",  # an optional CUDA extension
    "torch.utils._pytree": "is an Enum subclass and is now natively supported by torch.compile",  # because of torchao
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}


class NoticeFilter(logging.Filter):
    """Drops the records that contain `notice`."""

    def __init__(self, notice: str) -> None:
        super().__init__()
        self.notice = notice

    def filter(self, record: logging.LogRecord) -> bool:
        return self.notice not in record.getMessage()


def silence_libraries() -> None:
    """Drop the import notices and hide the progress bars of loading; warnings about weights are still printed."""
    for name, notice in IMPORT_NOTICES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(present, NoticeFilter) for present in logger.filters):
            logger.addFilter(NoticeFilter(notice))
    when_imported("transformers.utils.logging", _hide_loading_bars)
    if not sys.stderr.isatty():
        when_imported("datasets.utils.tqdm", _hide_dataset_bars)


def _hide_loading_bars() -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _hide_dataset_bars() -> None:
    from datasets.utils.tqdm import disable_progress_bars

    disable_progress_bars()
