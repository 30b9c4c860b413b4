"""The OpenAI protocol: what a request may say. What is not implemented is refused, not passed over."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_STOPS = 4  # as OpenAI's
MAX_STOP_LENGTH = 256  # characters
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20


def _encodable(text: str) -> str:
    """Return text that UTF-8 can say; half of a surrogate pair, which JSON can write, is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the string holds half of a surrogate pair, which is no text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    # A field that is not known would be one whose effect is silently missing.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream carries besides text."""

    include_usage: bool = False


class _Generation(_Strict):
    """Fields that both kinds of request have; what is not implemented is taken at its neutral value."""

    model: Text
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = Field(default=False, description="Not OpenAI's: go on behind the model's end, for measurements.")
    user: Text | None = Field(default=None, description="Taken and not used.")
    frequency_penalty: Literal[0] | None = Field(default=None, description="Not implemented: 0 or absent.")
    presence_penalty: Literal[0] | None = Field(default=None, description="Not implemented: 0 or absent.")
    logit_bias: Annotated[dict[Text, float], Field(max_length=0)] | None = Field(
        default=None, description="Not implemented: empty or absent."
    )

    @field_validator("frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def _zero_of_either_kind(cls, value: Any) -> Any:
        return 0 if isinstance(value, float) and value == 0 else value

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(_Generation):
    """Text, or token ids, to be continued."""

    prompt_field: ClassVar[str] = "prompt"
    continues_text: ClassVar[bool] = True
    tokens_default: ClassVar[int | None] = 16  # OpenAI's; a chat turn may fill its slot
    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: Literal[False] | None = Field(default=None, description="Not implemented: false or absent.")
    suffix: Literal[""] | None = Field(default=None, description="Not implemented: empty or absent.")
    best_of: Literal[1] | None = Field(default=None, description="Not implemented: 1 or absent.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one for each answer if n is 1."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def tokens_wanted(self) -> int | None:
        """Most tokens of an answer, as asked for."""
        return self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        """Alternatives to report for each token, None for no report."""
        return self.logprobs


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = Field(default=None, description="Taken and not used.")

    def plain(self) -> dict[str, str]:
        """Return the turn as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TextFormat(_Strict):
    """The only response format."""

    type: Literal["text"]


class ChatRequest(_Generation):
    """A conversation whose next turn is wanted."""

    prompt_field: ClassVar[str] = "messages"
    continues_text: ClassVar[bool] = False
    tokens_default: ClassVar[int | None] = None
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: TextFormat | None = None
    store: Literal[False] | None = Field(default=None, description="Nothing is stored.")

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.messages[-1].role != "user":
            raise ValueError("messages must end with a user's turn")
        return self

    @property
    def tokens_wanted(self) -> int | None:
        """Most tokens of an answer, as asked for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        """Alternatives to report for each token, None for no report."""
        return (self.top_logprobs or 0) if self.logprobs else None
