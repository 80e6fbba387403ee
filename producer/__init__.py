"""What puts latents into the queue and takes results out. Starts without torch.

>>> from producer import DecodeClient
>>> client = DecodeClient.from_env()
>>> job = client.submit(latents, vae="flux", height=1024, width=1024)
>>> job.wait(timeout=60)
>>> job.image().save("picture.png")
"""

from broker_config.decode_result import DecodeResult
from broker_config.errors import (
    BrokerError,
    InvalidJob,
    JobError,
    JobFailed,
    LatentqError,
    QueueFull,
    WaitTimeout,
)
from broker_config.job_record import JobSnapshot
from broker_config.job_status import JobStatus
from broker_config.messages import Mode, Output
from broker_config.settings import Settings
from broker_config.vae_catalog import VaeCatalog
from producer.async_client import AsyncDecodeClient
from producer.async_job_handle import AsyncJobHandle
from producer.client import DecodeClient
from producer.decode_options import DecodeOptions
from producer.job_handle import JobHandle
from producer.queued_vae import QueuedVAE

__all__ = [
    # clients
    "AsyncDecodeClient",
    "AsyncJobHandle",
    "DecodeClient",
    "DecodeOptions",
    "JobHandle",
    "QueuedVAE",
    "Settings",
    "VaeCatalog",
    # what they return
    "DecodeResult",
    "JobSnapshot",
    "JobStatus",
    "Mode",
    "Output",
    # errors
    "BrokerError",
    "InvalidJob",
    "JobError",
    "JobFailed",
    "LatentqError",
    "QueueFull",
    "WaitTimeout",
]
