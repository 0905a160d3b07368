"""`kvferry blend check`: what reuse costs on a user's own documents and questions, with the embedded engine.

Each question is asked behind the documents that are nearest to it, as a chat if the model has a chat template. It is
computed in full and with its documents reused, for each `k`; the engine compares the two, as nodes do.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engines.base import Engine
from engines.torch.engine import build_torch_engine
from kvcore.config.file import load_config
from kvcore.config.kv.settings import BlendConfig
from kvcore.config.schema import ClusterConfig, ModelConfig, TorchEngineConfig
from kvcore.errors import ConfigError, ContextLengthError, InvalidRequestError, KVFerryError
from kvcore.model_folder import find_folder
from kvferry.blend.folder import GivenDocument, NearestDocuments, read_documents, read_questions, read_text
from kvferry.cache.asking import STOPPED
from kvferry.cache.tables import table
from nodeapi.documents import CompareReply, CompareRequest, Documents
from router.documents.named import PromptTokens
from router.documents.reading import PromptReader
from router.requests.spec import ChatPrompt, TextPrompt
from router.shadow.judging import at_most
from router.shadow.limits import BlendGateLimits
from router.text.tokenizer import FolderTokenizer, Tokenizer

KS = (0, 8, 16, 32)
TOKENS = 12
Dtype = Literal["float32", "bfloat16", "float16"]
_BLOCK, _CHUNK = 16, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """As the command line has them."""

    model: str
    documents: Path
    questions: Path
    header: Path | None = None
    config: Path | None = None
    per_prompt: int = 3
    most: int = 50
    threads: int = 1
    as_json: bool = False


class CheckedSetting(msgspec.Struct, kw_only=True):
    """Means over all questions; times are medians, seconds to the first token. `times`: how much sooner."""

    k: int
    questions: int
    kl: float
    agreement: float
    full_s: float
    reused_s: float
    holds: bool
    """Within the limits of `kv.blend`."""

    @property
    def times(self) -> float:
        """How much sooner the first token comes."""
        return self.full_s / self.reused_s if self.reused_s else 0.0


class CheckedModel(msgspec.Struct, kw_only=True):
    """What `--json` prints. `k`: the setting to take; None: none holds the limits. `skipped`: questions that did not
    fit the model's context with their documents."""

    model: str
    settings: list[CheckedSetting]
    max_kl: float
    min_agreement: float
    prompt_tokens: float
    k: int | None = None
    skipped: int = 0


def run_check(options: CheckOptions, console: Console) -> int:
    """Read, compare, say. 1: no setting holds the limits, or it cannot be computed. Raises ConfigError."""
    limits, dtype = _limits(options.config)
    documents, questions = read_documents(options.documents), read_questions(options.questions)
    header = "" if options.header is None else read_text(options.header)
    tokenizer = FolderTokenizer(find_folder(options.model))
    prompts = _prompts(tokenizer, header, NearestDocuments(documents), questions[: options.most], options.per_prompt)
    try:
        checked = asyncio.run(_compare_all(options, dtype, limits, prompts, console))
    except KeyboardInterrupt:
        return STOPPED
    except ConfigError:
        raise
    except KVFerryError as error:
        sys.stderr.write(f"kvferry: error: {error.message}\n")
        return 1
    if options.as_json:
        print(msgspec.json.encode(checked).decode())
    else:
        console.print(settings_table(checked))
        for line in advice(checked):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if checked.k is not None else 1


def _limits(file: Path | None) -> tuple[BlendConfig, Dtype]:
    """Raises ConfigError for a cluster whose engine reuses no documents."""
    if file is None:
        return BlendConfig(), "float32"
    config: ClusterConfig = load_config(file)
    if not isinstance(config.engine, TorchEngineConfig):
        kind = "vLLM servers that run already" if config.engine is None else f"engine {_kind(config)}"
        raise ConfigError(f"{file}: {kind}: it reuses no documents, only engine torch does; there is nothing to check")
    return config.kv.blend, config.model.dtype


def _kind(config: ClusterConfig) -> str:
    assert config.engine is not None
    return str(config.engine.__struct_config__.tag)


def _prompts(
    tokenizer: Tokenizer, header: str, nearest: NearestDocuments, questions: Sequence[str], per_prompt: int
) -> list[PromptTokens]:
    """As a router reads them. Raises ConfigError where they cannot be told apart in the prompt."""
    reader, prompts = PromptReader(tokenizer), list[PromptTokens]()
    for question in questions:
        made = _prompt(tokenizer, header, nearest.of(question, per_prompt), question)
        read = reader.tokens(made, "")
        if read.documents is None or read.documents.why or not read.documents.spans:
            why = read.documents.why if read.documents is not None else "none was named"
            raise ConfigError(f"question {question[:60]!r}: its documents cannot be found in the prompt: {why}")
        prompts.append(read)
    return prompts


def _prompt(
    tokenizer: Tokenizer, header: str, documents: Sequence[GivenDocument], question: str
) -> ChatPrompt | TextPrompt:
    texts = [one.text for one in documents]
    if isinstance(tokenizer, FolderTokenizer) and tokenizer.chat_problem is not None:
        if header:
            raise ConfigError(
                f"--header: the model has no chat template that would place it ({tokenizer.chat_problem})"
            )
        return TextPrompt(question, documents=texts)
    parts: list[dict[str, object]] = [{"type": "text", "text": f"{text}\n\n", "document": True} for text in texts]
    system: list[dict[str, object]] = [{"role": "system", "content": header}] if header else []
    return ChatPrompt([*system, {"role": "user", "content": [*parts, {"type": "text", "text": question}]}])


async def _compare_all(
    options: CheckOptions, dtype: Dtype, limits: BlendConfig, prompts: Sequence[PromptTokens], console: Console
) -> CheckedModel:
    """Raises ConfigError for a model that cannot be loaded, or whose documents cannot be reused."""
    model = ModelConfig(path=options.model, name=Path(options.model).name, dtype=dtype)
    engine_config = TorchEngineConfig(threads=options.threads, block_size=_BLOCK)
    found: dict[int, list[CompareReply]] = {k: [] for k in KS}
    skipped, last = 0, ""
    async with build_torch_engine(model, engine_config, _CHUNK, lambda _: None) as engine:
        if why := engine.info.refuses_documents:
            raise ConfigError(f"{options.model}: documents cannot be reused: {why}")
        with Progress(console=console, disable=options.as_json or not console.is_terminal) as progress:
            for prompt in progress.track(prompts, description="comparing"):
                try:
                    for k in KS:
                        found[k].append(await _compared(engine, prompt, k))
                except (ContextLengthError, InvalidRequestError) as error:
                    skipped += 1
                    last = error.message
    if not found[KS[0]]:
        raise ConfigError(f"no question fits the model with its documents: {last}")
    settings = [_setting(k, replies, limits) for k, replies in found.items()]
    return CheckedModel(
        model=options.model,
        settings=settings,
        max_kl=limits.max_kl,
        min_agreement=limits.min_agreement,
        prompt_tokens=statistics.mean(len(prompt.token_ids) for prompt in prompts),
        k=next((one.k for one in settings if one.holds), None),
        skipped=skipped,
    )


async def _compared(engine: Engine, prompt: PromptTokens, k: int, deadline_s: float = 600.0) -> CompareReply:
    named = prompt.documents
    assert named is not None, "prompts without documents were refused"
    return await engine.compare(
        CompareRequest(
            request_id=f"check-{k}-{time.monotonic_ns()}",
            prompt_token_ids=prompt.token_ids,
            documents=Documents(header=named.header, spans=list(named.spans), k=k),
            num_tokens=TOKENS,
            deadline_s=deadline_s,
        )
    )


def _setting(k: int, replies: Sequence[CompareReply], limits: BlendConfig) -> CheckedSetting:
    most = BlendGateLimits().most_nats  # as the gate counts them
    kl = statistics.mean(at_most(one.kl[0], most) for one in replies)
    agreement = statistics.mean(one.agreement for one in replies)
    return CheckedSetting(
        k=k,
        questions=len(replies),
        kl=kl,
        agreement=agreement,
        full_s=statistics.median(one.full_s for one in replies),
        reused_s=statistics.median(one.reused_s for one in replies),
        holds=kl <= limits.max_kl and agreement >= limits.min_agreement,
    )


def gate_limits(setting: CheckedSetting) -> tuple[float, float]:
    """`max_kl` and `min_agreement` for a gate that notices what is wrong: a turn of K the wrong way costs a good model
    three times its divergence, and one token in six (tests/integration/test_blend_gate_model.py)."""
    return round(max(0.02, 2.5 * setting.kl), 3), round(max(0.0, setting.agreement - 0.1), 2)


def settings_table(checked: CheckedModel) -> Table:
    """A row a setting."""
    made = table("k", "first token diverges by", "tokens that agree", "first token in full", "reused", "sooner", "")
    for one in checked.settings:
        made.add_row(
            str(one.k),
            f"{one.kl:.4g} nats",
            f"{one.agreement:.1%}",
            f"{one.full_s:.3f} s",
            f"{one.reused_s:.3f} s",
            f"{one.times:.1f} times",
            "holds" if one.holds else "differs too much",
        )
    return made


def advice(checked: CheckedModel) -> list[str]:
    """What to take, and the lines of the cluster file for it."""
    limits = f"first token within {checked.max_kl:g} nats, {checked.min_agreement:.0%} of tokens the same"
    asked = f"{checked.settings[0].questions} questions, prompts of {checked.prompt_tokens:.0f} tokens"
    lines = [f"{asked}; wanted: {limits}"]
    if checked.skipped:
        lines.append(f"{checked.skipped} questions were left out: with their documents they are too long for the model")
    if checked.settings[0].questions < 20:
        lines.append("fewer than 20 questions: means of so few say little")
    if checked.k is None:
        return [*lines, "no setting holds that: leave kv.blend.mode off, or check what lower limits cost your users"]
    max_kl, min_agreement = gate_limits(next(one for one in checked.settings if one.k == checked.k))
    bounds = f"max_kl: {max_kl:g}, min_agreement: {min_agreement:g}"
    take = f"take k {checked.k}, the least that holds it, in the cluster file:"
    return [*lines, take, "kv:", f"  blend: {{mode: first_k, k: {checked.k}, {bounds}}}"]
