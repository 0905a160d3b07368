"""Whether documents may be reused now: by the setting, and by what that has cost of late (`router.shadow.gate`)."""

from dataclasses import replace

from kvcore.config.kv.settings import BlendConfig
from router.documents.named import DocumentKind
from router.requests.spec import RequestSpec
from router.shadow.gate import BlendGate


class DocumentGate:
    """Of one router. Asked once for each prompt that names documents."""

    def __init__(self, config: BlendConfig = BlendConfig(), judged: BlendGate | None = None) -> None:
        """`judged`: what turns kinds off by itself; None: nothing does."""
        self._config, self._judged = config, judged

    def __repr__(self) -> str:
        return f"<DocumentGate {self._config.mode}>"

    def why_not(self, model: str, kind: DocumentKind) -> str:
        """Why documents of this kind are computed as all other text is, for people; empty: they are reused. `model`:
        its name."""
        if self._config.mode == "off":
            return "kv.blend.mode is off"
        return self._judged.why_off(model, kind) if self._judged is not None else ""

    def passed(self, model: str, spec: RequestSpec) -> RequestSpec:
        """The request, whose documents are reused if the gate is open now."""
        if (named := spec.documents) is None:
            return spec
        why = named.why or ("" if named.spans else "none has a token")
        if not why and spec.sampling.prompt_logprobs is not None:
            why = "logprobs of the prompt are wanted, which KV does not have"
        return spec.changed(documents=replace(named, k=self._config.k, why=why or self.why_not(model, named.kind)))
