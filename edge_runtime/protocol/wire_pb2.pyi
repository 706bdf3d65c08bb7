from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Envelope(_message.Message):
    __slots__ = ("header", "body", "signature")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    body: bytes
    signature: bytes
    def __init__(self, header: _Optional[bytes] = ..., body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("kind", "federation", "generation", "round", "manifest_digest", "device", "sequence", "chunk_index", "chunk_count", "payload_digest")
    KIND_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    kind: int
    federation: str
    generation: int
    round: int
    manifest_digest: bytes
    device: str
    sequence: int
    chunk_index: int
    chunk_count: int
    payload_digest: bytes
    def __init__(self, kind: _Optional[int] = ..., federation: _Optional[str] = ..., generation: _Optional[int] = ..., round: _Optional[int] = ..., manifest_digest: _Optional[bytes] = ..., device: _Optional[str] = ..., sequence: _Optional[int] = ..., chunk_index: _Optional[int] = ..., chunk_count: _Optional[int] = ..., payload_digest: _Optional[bytes] = ...) -> None: ...

class DeviceCertificate(_message.Message):
    __slots__ = ("federation", "device", "signing_key", "role", "epoch")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SIGNING_KEY_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    federation: str
    device: str
    signing_key: bytes
    role: int
    epoch: int
    def __init__(self, federation: _Optional[str] = ..., device: _Optional[str] = ..., signing_key: _Optional[bytes] = ..., role: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class AggregatorCertificate(_message.Message):
    __slots__ = ("federation", "signing_key", "sealing_key", "generation", "first_round", "last_round")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    SIGNING_KEY_FIELD_NUMBER: _ClassVar[int]
    SEALING_KEY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROUND_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUND_FIELD_NUMBER: _ClassVar[int]
    federation: str
    signing_key: bytes
    sealing_key: bytes
    generation: int
    first_round: int
    last_round: int
    def __init__(self, federation: _Optional[str] = ..., signing_key: _Optional[bytes] = ..., sealing_key: _Optional[bytes] = ..., generation: _Optional[int] = ..., first_round: _Optional[int] = ..., last_round: _Optional[int] = ...) -> None: ...

class RevocationList(_message.Message):
    __slots__ = ("federation", "number", "entries")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    federation: str
    number: int
    entries: _containers.RepeatedCompositeFieldContainer[Revocation]
    def __init__(self, federation: _Optional[str] = ..., number: _Optional[int] = ..., entries: _Optional[_Iterable[_Union[Revocation, _Mapping]]] = ...) -> None: ...

class Revocation(_message.Message):
    __slots__ = ("device", "epoch")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    device: str
    epoch: int
    def __init__(self, device: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Signed(_message.Message):
    __slots__ = ("body", "signature")
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    signature: bytes
    def __init__(self, body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("token_id", "token_secret", "signing_key")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SECRET_FIELD_NUMBER: _ClassVar[int]
    SIGNING_KEY_FIELD_NUMBER: _ClassVar[int]
    token_id: str
    token_secret: bytes
    signing_key: bytes
    def __init__(self, token_id: _Optional[str] = ..., token_secret: _Optional[bytes] = ..., signing_key: _Optional[bytes] = ...) -> None: ...

class CheckIn(_message.Message):
    __slots__ = ("certificate", "ttl_s", "samples", "free_memory_bytes", "codecs", "runtime")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    FREE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    ttl_s: int
    samples: int
    free_memory_bytes: int
    codecs: _containers.RepeatedScalarFieldContainer[str]
    runtime: str
    def __init__(self, certificate: _Optional[bytes] = ..., ttl_s: _Optional[int] = ..., samples: _Optional[int] = ..., free_memory_bytes: _Optional[int] = ..., codecs: _Optional[_Iterable[str]] = ..., runtime: _Optional[str] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("digest", "wave", "want_index", "chunks")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    WAVE_FIELD_NUMBER: _ClassVar[int]
    WANT_INDEX_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    wave: bool
    want_index: bool
    chunks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, digest: _Optional[bytes] = ..., wave: bool = ..., want_index: bool = ..., chunks: _Optional[_Iterable[int]] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("samples", "steps", "loss_first", "loss_last", "codec", "delta", "parameter_count")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIRST_FIELD_NUMBER: _ClassVar[int]
    LOSS_LAST_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    samples: int
    steps: int
    loss_first: float
    loss_last: float
    codec: str
    delta: bytes
    parameter_count: int
    def __init__(self, samples: _Optional[int] = ..., steps: _Optional[int] = ..., loss_first: _Optional[float] = ..., loss_last: _Optional[float] = ..., codec: _Optional[str] = ..., delta: _Optional[bytes] = ..., parameter_count: _Optional[int] = ...) -> None: ...

class Telemetry(_message.Message):
    __slots__ = ("train_s", "steps", "samples", "peak_memory_bytes", "bytes_up", "bytes_down", "temperature_c", "resends")
    TRAIN_S_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_C_FIELD_NUMBER: _ClassVar[int]
    RESENDS_FIELD_NUMBER: _ClassVar[int]
    train_s: float
    steps: int
    samples: int
    peak_memory_bytes: int
    bytes_up: int
    bytes_down: int
    temperature_c: float
    resends: int
    def __init__(self, train_s: _Optional[float] = ..., steps: _Optional[int] = ..., samples: _Optional[int] = ..., peak_memory_bytes: _Optional[int] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., temperature_c: _Optional[float] = ..., resends: _Optional[int] = ...) -> None: ...

class EnrolAnswer(_message.Message):
    __slots__ = ("reject", "certificate", "request_digest")
    REJECT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    reject: int
    certificate: bytes
    request_digest: bytes
    def __init__(self, reject: _Optional[int] = ..., certificate: _Optional[bytes] = ..., request_digest: _Optional[bytes] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("verdict", "reject", "update_digest", "capped")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REJECT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CAPPED_FIELD_NUMBER: _ClassVar[int]
    verdict: int
    reject: int
    update_digest: bytes
    capped: bool
    def __init__(self, verdict: _Optional[int] = ..., reject: _Optional[int] = ..., update_digest: _Optional[bytes] = ..., capped: bool = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("digest", "is_index", "index", "content")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    IS_INDEX_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    is_index: bool
    index: int
    content: bytes
    def __init__(self, digest: _Optional[bytes] = ..., is_index: bool = ..., index: _Optional[int] = ..., content: _Optional[bytes] = ...) -> None: ...

class BlobRef(_message.Message):
    __slots__ = ("digest", "size")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    size: int
    def __init__(self, digest: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("epochs", "steps", "batch_size", "learning_rate", "momentum", "max_grad_norm", "beta", "sample_cap", "max_abs_delta", "scale_bits", "codecs", "optimizer", "nesterov", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "schedule")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_CAP_FIELD_NUMBER: _ClassVar[int]
    MAX_ABS_DELTA_FIELD_NUMBER: _ClassVar[int]
    SCALE_BITS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    NESTEROV_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    ADAM_BETA1_FIELD_NUMBER: _ClassVar[int]
    ADAM_BETA2_FIELD_NUMBER: _ClassVar[int]
    ADAM_EPSILON_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    epochs: int
    steps: int
    batch_size: int
    learning_rate: float
    momentum: float
    max_grad_norm: float
    beta: float
    sample_cap: int
    max_abs_delta: float
    scale_bits: int
    codecs: _containers.RepeatedScalarFieldContainer[str]
    optimizer: str
    nesterov: bool
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    schedule: Schedule
    def __init__(self, epochs: _Optional[int] = ..., steps: _Optional[int] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ..., momentum: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., beta: _Optional[float] = ..., sample_cap: _Optional[int] = ..., max_abs_delta: _Optional[float] = ..., scale_bits: _Optional[int] = ..., codecs: _Optional[_Iterable[str]] = ..., optimizer: _Optional[str] = ..., nesterov: bool = ..., weight_decay: _Optional[float] = ..., adam_beta1: _Optional[float] = ..., adam_beta2: _Optional[float] = ..., adam_epsilon: _Optional[float] = ..., schedule: _Optional[_Union[Schedule, _Mapping]] = ...) -> None: ...

class Schedule(_message.Message):
    __slots__ = ("shape", "factor", "every", "after", "rounds", "warmup_rounds")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    EVERY_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    shape: int
    factor: float
    every: int
    after: int
    rounds: int
    warmup_rounds: int
    def __init__(self, shape: _Optional[int] = ..., factor: _Optional[float] = ..., every: _Optional[int] = ..., after: _Optional[int] = ..., rounds: _Optional[int] = ..., warmup_rounds: _Optional[int] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("federation", "generation", "round", "state", "base_version", "deadline_unix_ms", "plan", "model", "artifact", "cohort", "sealing_key", "chunk_bytes", "certificate", "parameter_count")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    SEALING_KEY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    federation: str
    generation: int
    round: int
    state: int
    base_version: int
    deadline_unix_ms: int
    plan: Plan
    model: BlobRef
    artifact: BlobRef
    cohort: BlobRef
    sealing_key: bytes
    chunk_bytes: int
    certificate: bytes
    parameter_count: int
    def __init__(self, federation: _Optional[str] = ..., generation: _Optional[int] = ..., round: _Optional[int] = ..., state: _Optional[int] = ..., base_version: _Optional[int] = ..., deadline_unix_ms: _Optional[int] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., model: _Optional[_Union[BlobRef, _Mapping]] = ..., artifact: _Optional[_Union[BlobRef, _Mapping]] = ..., cohort: _Optional[_Union[BlobRef, _Mapping]] = ..., sealing_key: _Optional[bytes] = ..., chunk_bytes: _Optional[int] = ..., certificate: _Optional[bytes] = ..., parameter_count: _Optional[int] = ...) -> None: ...

class Cohort(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, devices: _Optional[_Iterable[str]] = ...) -> None: ...

class Bundle(_message.Message):
    __slots__ = ("files",)
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[File]
    def __init__(self, files: _Optional[_Iterable[_Union[File, _Mapping]]] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("name", "content")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    content: bytes
    def __init__(self, name: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...
