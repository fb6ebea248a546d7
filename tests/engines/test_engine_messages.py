from __future__ import annotations

import pytest

from longclip_rt.tensorrt.messages import meaning


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("IPluginRegistry::getCreator: could not find plugin: pca_head version: 1", "a plug-in that is not registered"),
        ('creator && "Plugin not found, are the plugin name, version, and namespace correct?"', "a plug-in"),
        ("no tactics to implement the operation within workspace limit", "too little memory"),
        ("Error Code 2: OutOfMemory (Requested size was 1073741824 bytes.)", "too little memory"),
        ("Cuda Runtime (out of memory)", "too little memory"),
        ("Requested amount of GPU memory (1 bytes) could not be allocated.", "too little memory"),
        ("Cannot compile operation for Turing (SM75): FP32 GEMM is not supported.", "Build it with --precision fp16"),
        ("Attention operation was not supported by a dedicated kernel.", "no fused attention"),
        ("Serialization assertion failed. Version tag does not match.", "another version of the library"),
        ("not compatible with this version of TensorRT, expecting library version 11.4.0.106", "another version"),
        ("generated on an incompatible device, expecting compute 8.9 got compute 8.6", "for another GPU"),
        ("Serialization assertion plan->header.magicTag == rt::kPLAN_MAGIC_TAG failed.", "the file is damaged"),
        ("cudaError 35: CUDA driver version is insufficient for CUDA runtime version", "no NVIDIA GPU with a driver"),
        ("CUDA initialization failure with error: 100", "no NVIDIA GPU with a driver"),
    ],
)
def test_what_tensorrt_says_becomes_a_clause_with_a_remedy(message: str, wanted: str) -> None:
    clause = meaning(["Something before it.", message])
    assert wanted in clause and clause[0].islower() and not clause.endswith(".") and ". " in clause


def test_the_cause_goes_before_what_follows_from_it() -> None:
    noise = "catchCudaError: cudaError 35: CUDA driver version is insufficient for CUDA runtime version"
    assert "memory" in meaning([noise, "within workspace limit", noise])


def test_what_is_not_understood_is_passed_on() -> None:
    assert meaning([]) == "the library gave no reason"
    assert meaning(["A new kind\n  of error.", "Another."]) == "the library said: A new kind of error"


def test_that_there_is_no_gpu_hides_no_other_reason() -> None:
    noise = "catchCudaError: cudaError 35: CUDA driver version is insufficient for CUDA runtime version"
    told = meaning([noise, "kOPT values for profile 1 violate shape constraints.", noise])
    assert told.startswith(
        "the library said: kOPT values for profile 1 violate shape constraints. There may also be no"
    )
    assert meaning([noise, noise]).startswith("there is no NVIDIA GPU")
