"""`dfn-hf distill`."""

from typing import Annotated, Any

from ..hub.private_paths import public_name
from . import options
from .errors import refuse
from .paths import check_data, check_models, prepare_output
from .rows import echo_rows


def distill(
    output: options.Output,
    student: Annotated[
        str, options.panel(options.MODEL, help="DFN to train: the output of `convert --from llama TEACHER`.")
    ],
    teacher: Annotated[
        str, options.panel(options.MODEL, help="Model to imitate: a folder, a bundled checkpoint or a Hub id.")
    ],
    data: options.TextData = None,
    validation_data: options.ValidationText = None,
    validation_blocks: options.ValidationBlocks = 128,
    text_field: options.TextField = "text",
    streaming: options.Streaming = False,
    block_size: options.BlockSize = 768,
    max_steps: options.MaxSteps = 400,
    batch_size: options.BatchSize = 1,
    gradient_accumulation_steps: options.GradientAccumulationSteps = 1,
    learning_rate: Annotated[
        float,
        options.panel(options.TRAINING, min=0, help="Peak learning rate; near the rate the teacher was trained with."),
    ] = 3e-3,
    warmup_ratio: options.WarmupRatio = 0.1,
    weight_decay: options.WeightDecay = 0.1,
    layerwise_ratio: Annotated[
        float,
        options.panel(
            options.TRAINING, min=0, max=1, help="Fraction of the steps, from the first, that fit each layer alone."
        ),
    ] = 0.15,
    save_steps: options.SaveSteps = 100,
    seed: options.Seed = 0,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Distil a Llama into the DFN that was converted from it.

    Example: `dfn-hf convert --from llama my-llama start`, then
    `dfn-hf distill my-dfn --student start --teacher my-llama --data books/`

    To continue an interrupted run: add `--resume`
    """
    refuse(validation_data is not None and data is None, "--validation-data needs --data: add it")
    check_models(student, teacher)
    check_data(data, validation_data)
    prepare_output(output, resume=resume, overwrite=overwrite)

    from ..data.lm_blocks import text_blocks
    from ..loading.models import load_causal_lm
    from ..training.distillation import DistillationSettings, check_tokenizers, distill_model

    settings = DistillationSettings(
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        save_steps=save_steps,
        layerwise_ratio=layerwise_ratio,
        seed=seed,
    )
    student_model, tokenizer = load_causal_lm(student)
    teacher_model, teacher_tokenizer = load_causal_lm(teacher)
    check_tokenizers(tokenizer, teacher_tokenizer)
    blocks, validation = text_blocks(
        tokenizer,
        block_size,
        data,
        validation_data,
        num_validation=validation_blocks,
        text_field=text_field,
        streaming=streaming,
        seed=seed,
    )
    result = distill_model(
        student_model,
        teacher_model,
        tokenizer,
        blocks,
        validation,
        output,
        settings,
        provenance=f"Distilled from {public_name(teacher)} on {public_name(data or options.BUNDLED_TEXT)}, in blocks "
        f"of {block_size} tokens, starting from {public_name(student)}.",
        resume=resume,
        overwrite=overwrite,
    )
    print_result(result)


def print_result(result: Any) -> None:
    """Print the losses and the cost of a distillation, from the main process."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    echo_rows(
        {
            "teacher": f"{result.teacher_loss:.4f} nats per token on the validation text",
            "student": f"{result.initial_loss:.4f} → {result.validation_loss:.4f} nats per token",
            "tokens": f"{result.num_tokens:,}",
            "operations": f"{result.operations:.2e}: per token 6 for each parameter of the student and 2 for each of "
            "the teacher, without embeddings",
            "saved in": str(result.folder),
        }
    )
