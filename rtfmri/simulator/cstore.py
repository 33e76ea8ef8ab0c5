"""Sends volumes to a DICOM node (C-STORE), as a scanner does: one association for the run."""

import socket
from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any

from rtfmri.errors import ConfigError, RecordingError
from rtfmri.readers.network import Address
from rtfmri.simulator.dicom import Series
from rtfmri.volume import Volume

if TYPE_CHECKING:
    from pydicom import Dataset

DEFAULT_PORT = 11112
_ANSWER_S = 30.0
"""How long we wait for an association, for the status of an image, or to get rid of bytes."""
_CUT_PDU_BYTES = 1024
"""Length of the pieces of an image that is broken off: so small that there are always several."""


class DicomTarget:
    """A DICOM node that is sent Siemens mosaics.

    Parameters
    ----------
    address : Address
        Where it listens.
    ae : str
        How it is called.
    caller : str
        How we are called.

    Raises
    ------
    ConfigError
        If pynetdicom is not installed.
    RecordingError
        If nobody is there, or the association is refused.
    """

    def __init__(self, address: Address, *, ae: str = "RTFMRI", caller: str = "SIMULATOR") -> None:
        try:
            import pynetdicom
        except ImportError:
            raise ConfigError(
                "a dicom:// target needs pynetdicom: pip install 'rtfmri[dicom]'"
            ) from None
        from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

        self._address, self._title = address, ae
        self._node = pynetdicom.AE(caller)
        self._node.add_requested_context(MRImageStorage, ExplicitVRLittleEndian)
        self._node.connection_timeout = self._node.acse_timeout = _ANSWER_S
        self._node.dimse_timeout = _ANSWER_S
        self._node.network_timeout = None  # between two volumes there may be silence
        self._handlers = [(pynetdicom.evt.EVT_CONN_OPEN, self._take_socket)]
        self._socket: socket.socket | None = None
        self._series = Series()
        self._association = self._associate()

    def send(self, volume: Volume, *, stranger: bool = False, share: float = 1.0) -> None:
        """Send a volume and wait for its status; one that is cut ends with an abort."""
        dataset = self._series.mosaic(volume, stranger)
        if not self._association.is_established:
            self._association = self._associate()
        if share < 1:
            self._break_off(dataset, share)
            return
        try:
            answer = self._association.send_c_store(dataset)
        except RuntimeError:  # the association has ended just now
            answer = ()
        if "Status" not in answer:
            raise RecordingError(f"{self} went away instead of taking volume {volume.index}")
        # Warnings have 0xBxxx; the image is stored all the same (PS3.4, table B.2-1).
        if answer.Status != 0 and answer.Status >> 12 != 0xB:
            raise RecordingError(
                f"{self} refused volume {volume.index} with the status 0x{answer.Status:04X}"
            )

    def die(self) -> None:
        """Close the connection, and nothing else."""
        if self._socket is not None:
            with suppress(OSError):  # it may be closed already
                self._socket.shutdown(socket.SHUT_RDWR)
            self._association.join(_ANSWER_S)
            self._close_socket()

    def close(self) -> None:
        """Release the association."""
        self._association.release()
        self._close_socket()

    def __str__(self) -> str:
        return f"dicom://{self._address.host}:{self._address.port}"

    def _associate(self) -> Any:
        self._close_socket()
        association = self._node.associate(
            self._address.host,
            self._address.port,
            ae_title=self._title,
            evt_handlers=self._handlers,
        )
        if association.is_established:
            return association
        self._close_socket()
        if association.is_rejected:
            answer = association.acceptor.primitive
            raise RecordingError(
                f"{self}?ae={self._title}&caller={self._node.ae_title} refused the association: "
                f"{answer.reason_str}"
            )
        if association.acceptor.primitive is not None:
            raise RecordingError(f"{self} takes no MR images (explicit VR, little endian)")
        raise RecordingError(f"no DICOM node answers at {self}")

    def _break_off(self, dataset: "Dataset", share: float) -> None:
        """Send the beginning of a C-STORE request in pieces, then abort the association."""
        from pynetdicom.dimse_messages import C_STORE_RQ
        from pynetdicom.dimse_primitives import C_STORE
        from pynetdicom.dsutils import encode

        request = C_STORE()
        request.MessageID = 1
        request.Priority = 2
        request.AffectedSOPClassUID = dataset.SOPClassUID
        request.AffectedSOPInstanceUID = dataset.SOPInstanceUID
        request.DataSet = BytesIO(encode(dataset, False, True))
        message = C_STORE_RQ()
        message.primitive_to_message(request)
        context_id = self._association.accepted_contexts[0].context_id
        pieces = list(message.encode_msg(context_id, _CUT_PDU_BYTES))
        for piece in pieces[: 1 + int(share * (len(pieces) - 1))]:  # the first is the command
            self._association.dul.send_pdu(piece)
        self._association.abort()

    def _take_socket(self, event: Any) -> None:
        self._socket = event.assoc.dul.socket.socket
        # A node that has stopped reading must not hold us for ever.
        self._socket.settimeout(_ANSWER_S)

    def _close_socket(self) -> None:
        """Close what pynetdicom leaves open where the other side was faster."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None
