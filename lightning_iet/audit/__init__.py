"""The audit: which generated images are copies of training images."""

from typing import TYPE_CHECKING

from lightning_iet.utilities.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_iet.audit.core import Audit, Settings, audit_images
    from lightning_iet.audit.findings import Findings, make_findings
    from lightning_iet.audit.reading import ImageSet, image_set
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["Audit", "Findings", "ImageSet", "Settings", "audit_images", "image_set", "make_findings"]
