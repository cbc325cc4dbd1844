// What the parts of the fake CUDA runtime share: counters by name, and the calls after which the host has waited.
#pragma once
#include <cstddef>
#include <string>

void note(const std::string& what, long count = 1);
void noted_call(const std::string& what, long count = 1);  // of a call that works on the current device
size_t next_handle();
void copy_small(void* to, const void* from, size_t bytes);  // large contents are garbage: nobody computed them

// Bytes up to which CUDA stages a pageable copy without waiting.
constexpr size_t SMALL = 65536;
