"""Every error latentq raises, as one tree.

::

    LatentqError
    ├── ConfigurationError            settings, catalogue or environment are wrong
    │   ├── CatalogInvalid
    │   ├── BrokerBinaryMissing       no server binary for the embedded broker
    │   ├── BrokerNotRunning          no embedded broker runs and no URL is set
    │   ├── WorkerNameTaken           a worker of this name is alive, or was until just now
    │   └── BrokerUnsupported         too old, or evicts keys
    ├── BrokerError                   the broker is configured, but does not serve us (retryable)
    │   ├── BrokerUnreachable
    │   ├── BrokerRefusesWrites       out of memory, disk full, read-only replica
    │   ├── BlobStoreUnavailable      the folder or bucket of large blobs does not do what it should
    │   ├── SpoolUnavailable          neither the broker nor the spool folder takes the job
    │   └── QueueFull                 admission is closed; carries retry_after_s
    ├── InvalidJob                    refused before anything is allocated (never retryable)
    │   ├── UnknownVae · UnknownLayout · UnknownPipeline · InvalidOption · InvalidRow
    │   ├── InvalidRank · InvalidChannels · InvalidDtype · InvalidSize · LatentsNotFinite
    │   ├── PixelLimitExceeded · LatentsTooLarge · WebhooksNotConfigured · WebhookSecretMissing
    │   ├── WebhookUrlRefused         WebhookAddressRefused
    │   └── InvalidTensorFile         NotSafetensors · TensorFileTruncated · TensorFileOversized · SpoolFileDamaged
    ├── JobError                      about one job that exists, existed, or never did
    │   ├── JobNotFound · JobSpooled · JobConflict · JobNotFinished · WaitTimeout
    │   └── JobFailed · JobCanceled · ResultExpired · WrongOutput
    ├── BlobError                     BlobMissing · BlobStoreUnknown · BlobCorrupt
    ├── RequestError                  an HTTP request was refused by the gateway, whatever it asked for
    │   ├── BadRequest · RouteNotFound · MethodNotAllowed · MediaTypeUnsupported · RangeNotSatisfiable
    │   ├── NotAuthenticated · NotAllowed · WrongHost · LinkInvalid · LinkExpired
    │   ├── LengthRequired · BodyTooLarge · QueryTooLong · UploadTooSlow
    │   ├── TryLater                  RateLimited · QuotaExceeded · GatewayBusy
    │   └── InternalError
    ├── DeliveryNotFound              no such delivery of a webhook
    ├── DenoiseFailed                 the pipeline of a prompt farm raised
    └── WorkerError                   an attempt failed in the worker
        ├── WeightsMissing · WeightsMismatch · DecodeFailed · NonFiniteOutput · OutOfMemory
        ├── EncodeFailed · OutputTooLarge
        └── UnsupportedMessage · StartDeadlinePassed · JobTimedOut · WorkerCrashed

A leaf has a stable `code` (used on the wire, in logs and in docs/errors.md), says whether the same call can
succeed later (`retryable`), and its docstring is its default message. Messages name the field and the fix.
"""

from __future__ import annotations

from collections.abc import Iterator

from broker_config.errors.attempts import (
    DecodeFailed,
    EncodeFailed,
    JobTimedOut,
    NonFiniteOutput,
    OutOfMemory,
    OutputTooLarge,
    StartDeadlinePassed,
    UnsupportedMessage,
    WeightsMismatch,
    WeightsMissing,
    WorkerCrashed,
    WorkerError,
)
from broker_config.errors.base import LatentqError
from broker_config.errors.blobs import BlobCorrupt, BlobError, BlobMissing, BlobStoreUnknown
from broker_config.errors.broker import (
    BlobStoreUnavailable,
    BrokerError,
    BrokerRefusesWrites,
    BrokerUnreachable,
    QueueFull,
    SpoolUnavailable,
)
from broker_config.errors.configuration import (
    BrokerBinaryMissing,
    BrokerNotRunning,
    BrokerUnsupported,
    CatalogInvalid,
    ConfigurationError,
    WorkerNameTaken,
)
from broker_config.errors.farm import DenoiseFailed
from broker_config.errors.jobs import (
    JobCanceled,
    JobConflict,
    JobError,
    JobFailed,
    JobNotFinished,
    JobNotFound,
    JobSpooled,
    ResultExpired,
    WaitTimeout,
    WrongOutput,
)
from broker_config.errors.refusals import (
    InvalidChannels,
    InvalidDtype,
    InvalidJob,
    InvalidOption,
    InvalidRank,
    InvalidRow,
    InvalidSize,
    InvalidTensorFile,
    LatentsNotFinite,
    LatentsTooLarge,
    NotSafetensors,
    PixelLimitExceeded,
    SpoolFileDamaged,
    TensorFileOversized,
    TensorFileTruncated,
    UnknownLayout,
    UnknownPipeline,
    UnknownVae,
    WebhookAddressRefused,
    WebhookUrlRefused,
)
from broker_config.errors.requests import (
    BadRequest,
    BodyTooLarge,
    GatewayBusy,
    InternalError,
    LengthRequired,
    LinkExpired,
    LinkInvalid,
    MediaTypeUnsupported,
    MethodNotAllowed,
    NotAllowed,
    NotAuthenticated,
    QueryTooLong,
    QuotaExceeded,
    RangeNotSatisfiable,
    RateLimited,
    RequestError,
    RouteNotFound,
    TryLater,
    UploadTooSlow,
    WrongHost,
)
from broker_config.errors.webhooks import DeliveryNotFound, WebhookSecretMissing, WebhooksNotConfigured

__all__ = [
    "BadRequest",
    "BlobCorrupt",
    "BlobError",
    "BlobMissing",
    "BlobStoreUnavailable",
    "BlobStoreUnknown",
    "BodyTooLarge",
    "BrokerBinaryMissing",
    "BrokerError",
    "BrokerNotRunning",
    "BrokerRefusesWrites",
    "BrokerUnreachable",
    "BrokerUnsupported",
    "CatalogInvalid",
    "ConfigurationError",
    "DecodeFailed",
    "DeliveryNotFound",
    "DenoiseFailed",
    "EncodeFailed",
    "GatewayBusy",
    "InternalError",
    "InvalidChannels",
    "InvalidDtype",
    "InvalidJob",
    "InvalidOption",
    "InvalidRank",
    "InvalidRow",
    "InvalidSize",
    "InvalidTensorFile",
    "JobCanceled",
    "JobConflict",
    "JobError",
    "JobFailed",
    "JobNotFinished",
    "JobNotFound",
    "JobSpooled",
    "JobTimedOut",
    "LatentqError",
    "LatentsNotFinite",
    "LatentsTooLarge",
    "LengthRequired",
    "LinkExpired",
    "LinkInvalid",
    "MediaTypeUnsupported",
    "MethodNotAllowed",
    "NonFiniteOutput",
    "NotAllowed",
    "NotAuthenticated",
    "NotSafetensors",
    "OutOfMemory",
    "OutputTooLarge",
    "PixelLimitExceeded",
    "QueryTooLong",
    "QueueFull",
    "QuotaExceeded",
    "RangeNotSatisfiable",
    "RateLimited",
    "RequestError",
    "ResultExpired",
    "RouteNotFound",
    "SpoolFileDamaged",
    "SpoolUnavailable",
    "StartDeadlinePassed",
    "TensorFileOversized",
    "TensorFileTruncated",
    "TryLater",
    "UnknownLayout",
    "UnknownPipeline",
    "UnknownVae",
    "UnsupportedMessage",
    "UploadTooSlow",
    "WaitTimeout",
    "WebhookAddressRefused",
    "WebhookSecretMissing",
    "WebhookUrlRefused",
    "WebhooksNotConfigured",
    "WeightsMismatch",
    "WeightsMissing",
    "WorkerCrashed",
    "WorkerError",
    "WorkerNameTaken",
    "WrongHost",
    "WrongOutput",
    "walk",
]


def walk(root: type[LatentqError] = LatentqError) -> Iterator[type[LatentqError]]:
    """Every class of the tree, parents first (for the docs, and for the test that checks the codes)."""
    yield root
    for child in root.__subclasses__():
        yield from walk(child)
