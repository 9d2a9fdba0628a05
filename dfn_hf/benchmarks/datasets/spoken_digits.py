"""Spoken digits of Debian's asterisk-core-sounds-en-wav: recordings of one digit, and digits cut from prompts.

    apt-get download asterisk-core-sounds-en-wav && dpkg -x asterisk-core-sounds-en-wav_*.deb sounds

One speaker (Allison Smith), 8 kHz, CC-BY-SA-3.0. `CUTS` lists the digits in the prompts of version 1.6.1 with their
times in seconds: the published texts of the prompts, aligned by pocketsphinx 5 with its model for US English. No take
occurs twice: the correlation between the middle parts of two takes is at most 0.82.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dfn_hf.data.audio import read_recording

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PACKAGE = "asterisk-core-sounds-en-wav"
SINGLE = "digits/{}"
HELD_OUT = (
    "basic-pbx-ivr-main", "dictate/forhelp", "dictate/play_help", "dictate/record_help", "dir-multi9",
    "followme/options", "vm-Cust1", "vm-Cust2", "vm-Cust3", "vm-Cust4", "vm-Cust5", "vm-msginstruct", "vm-next",
    "vm-options", "vm-savemessage",
)  # fmt: skip
CUTS = """
basic-pbx-ivr-main: one 13.06-13.64, two 15.85-16.37, three 19.3-19.9, four 21.99-22.55, zero 24.49-25.06
conf-adminmenu-162: one 0.81-1.08, two 3.26-3.54, three 6.1-6.51, four 8.63-8.96, six 9.22-9.67, five 13.15-13.46, seven 15.35-15.68, nine 15.91-16.43, eight 19.43-19.8
conf-adminmenu-18: one 1.02-1.3, two 3.35-3.68, three 6.26-6.62, four 8.68-9.05, six 9.33-9.79, five 13.2-13.52, seven 15.45-15.86, nine 16.12-16.61, eight 19.81-20.32
conf-adminmenu-menu8: one 0.52-0.93, two 3.66-4.01, three 6.91-7.3, four 11.22-11.5, eight 13.41-13.85
conf-adminmenu: one 1.06-1.31, two 3.55-3.87, three 6.4-6.76, four 8.84-9.18, six 9.59-9.92, seven 13.52-14.01, nine 14.18-14.67, eight 17.72-18.1
conf-usermenu-162: one 0.74-1.02, four 3.38-3.76, six 4.06-4.53, five 7.95-8.34, seven 10.3-10.71, nine 11.05-11.68, eight 14.78-15.21
conf-usermenu: one 1.04-1.42, four 3.61-3.98, six 4.25-4.69, seven 8.19-8.59, nine 8.85-9.29, eight 12.41-12.76
dictate/forhelp: zero 0.48-0.94
dictate/play_help: one 0.52-0.89, two 3.08-3.45, seven 5.93-6.34, eight 8.22-8.61
dictate/record_help: one 0.45-0.89, eight 3.23-3.68
dir-instr: one 2.91-3.22
dir-intro-fn: three 3.1-3.37, seven 8.44-8.85, nine 10.4-10.81
dir-intro: three 3.03-3.29, seven 8.52-8.89, nine 10.33-10.76
dir-usingkeypad: seven 2.67-3.04, nine 4.48-4.88
dir-multi9: nine 0.43-0.85
followme/options: one 0.34-0.68, two 2.21-2.53
priv-callee-options: one 0.62-1.11, two 5.98-6.43, three 11.31-11.88, four 17.03-17.58, five 23.64-24.17
screen-callee-options: one 2.39-2.82, two 6.45-6.94, three 10.13-10.71, four 13.91-14.45
vm-advopts: three 0.44-0.89
vm-calldiffnum: two 0.42-0.8
vm-Cust1: five 0.49-1
vm-Cust2: six 0.45-0.91
vm-Cust3: seven 0.47-1.19
vm-Cust4: eight 0.59-1.05
vm-Cust5: nine 0.43-1.16
vm-delete: seven 0.37-0.75
vm-forward-multiple: one 0.47-0.76, two 2.37-2.82
vm-forwardoptions: one 0.39-0.82, two 2.91-3.3
vm-forward: one 0.45-0.86, two 2.87-3.37
vm-instructions: one 2.03-2.36
vm-leavemsg: five 0.32-0.81
vm-msginstruct: six 2.2-2.5, five 4.62-5.11, four 7.5-8.02, zero 11.28-11.91
vm-next: six 0.55-0.91
vm-onefor-full: one 0.43-0.81
vm-onefor: one 0.49-0.86
vm-options: one 0.43-0.74, two 3.58-3.95, three 6.48-6.88, four 8.76-9.19, five 11.56-12.05
vm-opts-full: two 0.61-0.94, three 4.66-5.06, zero 8.08-8.49
vm-opts: two 0.64-0.98, three 2.82-3.2, zero 5.34-5.79
vm-prev: four 0.62-1.04
vm-reachoper: zero 0.47-0.84
vm-repeat: five 0.35-0.86
vm-review-nonurgent: four 0.63-1
vm-review: one 0.56-0.97, two 3.27-3.63, three 5.27-5.72
vm-review-urgent: four 0.47-0.91
vm-savemessage: nine 0.34-0.94
vm-saveoper: one 0.56-0.9
vm-tempgreeting2: one 0.49-0.86, two 3.71-4.07
vm-tempgreeting: one 0.46-0.88
vm-tocallback: two 0.51-0.98
vm-tocallnum: one 0.55-1.03
vm-toenternumber: one 0.58-0.94
vm-toforward: eight 0.45-0.77
vm-tohearenv: three 0.55-0.96
vm-tomakecall: four 0.6-0.94
vm-toreply: one 0.46-0.84
vm-torerecord: three 0.48-0.99
vm-undelete: seven 0.47-0.86
"""  # noqa: E501


@dataclass(frozen=True)
class SpokenDigit:
    """One take of a digit.

    Attributes:
        word: one of `WORDS`.
        samples: float32 `[samples]` in [−1, 1].
        rate: sampling rate in Hz.
        recording: name of the source file.
    """

    word: str
    samples: torch.Tensor
    rate: int
    recording: str


def spoken_digits(folder: str | Path) -> tuple[list[SpokenDigit], list[SpokenDigit]]:
    """Return the takes for training, and the takes of the recordings in `HELD_OUT`.

    Args:
        folder: the unpacked package, or a folder in it with `digits/0.wav` and the prompts.

    Raises:
        ValueError: `folder` has no recordings.
    """
    root = sounds_root(Path(folder))
    train: list[SpokenDigit] = []
    held_out: list[SpokenDigit] = []
    for number, word in enumerate(WORDS):
        recording = SINGLE.format(number)
        train.append(SpokenDigit(word, *read_recording(root / f"{recording}.wav"), recording))
    for line in CUTS.strip().splitlines():
        recording, takes = line.split(": ")
        samples, rate = read_recording(root / f"{recording}.wav")
        for take in takes.split(", "):
            word, span = take.split(" ")
            first, last = (round(float(second) * rate) for second in span.split("-"))
            digit = SpokenDigit(word, samples[first:last], rate, recording)
            (held_out if recording in HELD_OUT else train).append(digit)
    return train, held_out


def sounds_root(folder: Path) -> Path:
    """Return the folder with `digits/` and the prompts."""
    for single in sorted(folder.rglob(f"{SINGLE.format(0)}.wav")):
        if (single.parent.parent / f"{HELD_OUT[0]}.wav").is_file():
            return single.parent.parent
    raise ValueError(
        f"{folder} has no recordings of {PACKAGE}: unpack the package there (apt-get download {PACKAGE} && dpkg -x "
        f"{PACKAGE}_*.deb {folder})"
    )
