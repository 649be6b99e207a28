// What Python calls; see kernels/native/library.py.
#include <exception>

#include "step.h"

extern "C" {

int baton_width() { return baton::kWidth; }

int baton_amx() { return baton::has_amx(); }

// Sizes of the structures that Python has its own copies of.
void baton_sizes(int64_t* sizes) {
  sizes[0] = sizeof(baton::Op);
  sizes[1] = sizeof(baton::Plan);
  sizes[2] = sizeof(baton::StepInput);
  sizes[3] = sizeof(baton::Sequence);
  sizes[4] = sizeof(baton::Source);
  sizes[5] = sizeof(baton::Routing);
}

int64_t baton_packed_bytes(int64_t inputs, int64_t outputs, baton::Format format) {
  return baton::packed_bytes(inputs, outputs, format);
}

// Copies a source's rows into a matrix as its outputs from `first` on, with so many threads.
int baton_pack(const baton::Matrix* matrix, int64_t first, const baton::Source* source,
               int threads) try {
  baton::Team team(threads);
  team.run([&](int thread) { baton::pack(*matrix, first, *source, thread, threads); });
  return baton::kDone;
} catch (const std::exception&) {
  return baton::kNoMemory;
}

// Returns null if there is no memory, or no thread, to be had.
baton::Program* baton_program_new(const baton::Plan* plan, int threads) try {
  return new baton::Program(*plan, threads);
} catch (const std::exception&) {
  return nullptr;
}

void baton_program_delete(baton::Program* program) { delete program; }

int baton_program_run(baton::Program* program, const baton::StepInput* input, int first,
                      int last) try {
  return program->run(*input, first, last);
} catch (const std::exception&) {
  return baton::kNoMemory;
}

}  // extern "C"
