"""SGLang on CPU with the kernels it has in plain PyTorch."""

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()  # no triton, no graph capture

    def get_device(self, device_id=0):
        return "cpu"

    def apply_server_args_defaults(self, server_args):
        server_args.attention_backend = server_args.attention_backend or "torch_native"
        server_args.sampling_backend = server_args.sampling_backend or "pytorch"
        server_args.disable_overlap_schedule = True

    def get_default_attention_backend(self):
        return "torch_native"

    def get_compile_backend(self, mode=None):
        return "eager"

    def get_dispatch_key_name(self):
        return "native"
