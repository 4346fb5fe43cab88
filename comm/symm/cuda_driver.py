"""The CUDA driver's virtual memory calls on one device, through cuda-python, and NVML's word on its NVLink clique.

Written from the documentation; never run on a device so far.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch
from torch import Tensor

from moeserve.comm.symm.fabric import Clique, DriverError

ADDRESS_ALIGNMENT = 2 << 20
NVML_FABRIC_STATE_COMPLETED = 3


class CudaDriver:
    """Driver (see fabric.py) of one CUDA device of torch.

    Raises DriverError where cuda-python, the driver or the device is missing.
    """

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise DriverError("torch finds no CUDA device")
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise DriverError(f"cuda-python is missing ({error}): pip install cuda-python") from None
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        torch.zeros(1, device=self._device)  # makes the device's context and this thread's current one
        self._ordinal = self._call("cuDeviceGet", index)

    def can_export(self, fabric: bool) -> bool:
        name = "FABRIC" if fabric else "POSIX_FILE_DESCRIPTOR"
        attribute = getattr(
            self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_{name}_SUPPORTED"
        )
        return bool(self._call("cuDeviceGetAttribute", attribute, self._ordinal))

    def clique(self) -> Clique | None:
        try:
            bus_id = self._call("cuDeviceGetPCIBusId", 32, self._ordinal)
        except DriverError:
            return None
        return nvml_clique(bytes(bus_id).rstrip(b"\0"))

    def granularity(self, fabric: bool) -> int:
        recommended = self._cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(self._call("cuMemGetAllocationGranularity", self._properties(fabric), recommended))

    def create(self, nbytes: int, fabric: bool) -> int:
        return int(self._call("cuMemCreate", nbytes, self._properties(fabric), 0))

    def export(self, handle: int, fabric: bool) -> bytes | int:
        exported = self._call("cuMemExportToShareableHandle", handle, self._kind(fabric), 0)
        return bytes(exported.data) if fabric else int(exported)

    def import_handle(self, exported: bytes | int, fabric: bool) -> int:
        return int(self._call("cuMemImportFromShareableHandle", exported, self._kind(fabric)))

    def reserve(self, nbytes: int) -> int:
        return int(self._call("cuMemAddressReserve", nbytes, ADDRESS_ALIGNMENT, 0, 0))

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._call("cuMemMap", address, nbytes, 0, handle, 0)
        access = self._cuda.CUmemAccessDesc()
        access.location.type = self._cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self._device.index
        access.flags = self._cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        try:
            self._call("cuMemSetAccess", address, nbytes, [access], 1)
        except DriverError:
            self._call("cuMemUnmap", address, nbytes)
            raise

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", handle)

    def unmap(self, address: int, nbytes: int) -> None:
        self._call("cuMemUnmap", address, nbytes)

    def free(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", address, nbytes)

    def tensor(self, address: int, nbytes: int) -> Tensor:
        """On our device whoever's memory it is: torch would else take a peer's memory for the peer's device."""
        storage = torch._C._construct_storage_from_data_pointer(address, self._device, nbytes)
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)

    def _kind(self, fabric: bool) -> Any:
        kinds = self._cuda.CUmemAllocationHandleType
        if fabric:
            return kinds.CU_MEM_HANDLE_TYPE_FABRIC
        return kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _properties(self, fabric: bool) -> Any:
        properties = self._cuda.CUmemAllocationProp()
        properties.type = self._cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = self._kind(fabric)
        properties.location.type = self._cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self._device.index
        return properties

    def _call(self, name: str, *arguments: Any) -> Any:
        """A call of the driver -> its result. Raises DriverError with the driver's name of the error."""
        status, *results = getattr(self._cuda, name)(*arguments)
        if int(status) != 0:
            raise DriverError(f"{name}: {getattr(status, 'name', status)}")
        return results[0] if results else None


class _FabricInfo(ctypes.Structure):
    """nvmlGpuFabricInfo_t: the first form of it, which every driver with a fabric knows."""

    _fields_ = (
        ("cluster", ctypes.c_ubyte * 16),
        ("status", ctypes.c_uint),
        ("clique", ctypes.c_uint),
        ("state", ctypes.c_ubyte),
    )


def nvml_clique(pci_bus_id: bytes, library: Any = None) -> Clique | None:
    """What NVML says of the device at that PCI address; None where it is in no clique, or NVML cannot tell."""
    try:
        nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return None
    except (OSError, AttributeError):
        return None
    try:
        device, info = ctypes.c_void_p(), _FabricInfo()
        if nvml.nvmlDeviceGetHandleByPciBusId_v2(pci_bus_id, ctypes.byref(device)) != 0:
            return None
        if nvml.nvmlDeviceGetGpuFabricInfo(device, ctypes.byref(info)) != 0:
            return None
    except AttributeError:  # a driver of before the fabric
        return None
    finally:
        nvml.nvmlShutdown()
    cluster = int.from_bytes(bytes(info.cluster), "big")
    if info.state != NVML_FABRIC_STATE_COMPLETED or info.status != 0 or cluster == 0:
        return None
    return Clique(cluster, info.clique)
