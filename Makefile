# Makefile - builds dsrun. `make help` lists the targets.
#
# Kernels for the CPU are compiled once for every level of the instruction set and chosen when
# dsrun starts; nothing is built for the machine it is built on. Objects are linked directly, not
# through an archive: the kernel tables refer to them weakly, and weak references pull nothing out
# of an archive. A change of compiler or flags rebuilds what it concerns (the .flags stamps).

BUILD  ?= build
PREFIX ?= /usr/local
FUZZ_SECONDS ?= 20
VERSION := 0.1.0

# gcc 12 or newer, under whichever name
ifeq ($(origin CC),default)
CC := $(firstword $(shell for c in gcc gcc-12 gcc-13 gcc-14; do \
        v=$$($$c -dumpversion 2>/dev/null) && [ "$${v%%.*}" -ge 12 ] && echo $$c && break; done) gcc)
endif
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc) --no-print-directory
endif

# One short line a file; V=1 prints the commands.
ifeq ($(V),)
quiet = @printf '  %-5s %s\n' $(1) '$(2)';
endif

# ---- flags

packages := luajit jansson libxxhash
mpi      := ompi-c
WARNINGS := -Wall -Wextra -Wpedantic
# clang tells of every `omp simd` loop that a level has no vectors for: a wish, and no mistake
WARNINGS += $(if $(findstring clang,$(shell $(CC) --version 2>/dev/null)),-Wno-pass-failed)
STRICT   := $(if $(WERROR),-Werror)
SANITIZE ?=
CFLAGS   ?= -O2 -g
CHECKED  := $(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-sanitize-recover=undefined \
            -fno-omit-frame-pointer)
BASE     := -std=c11 -D_GNU_SOURCE -I. -fopenmp $(WARNINGS) $(CHECKED) \
            $(shell pkg-config --cflags $(packages) 2>/dev/null)
KERNEL   := $(if $(SANITIZE),-O1,-O3) -fno-math-errno -fno-trapping-math
LINK     := -fopenmp -Wl,-E -Wl,--as-needed -Wl,-O1 $(CHECKED) $(LDFLAGS)
LDLIBS   := $(shell pkg-config --libs $(packages) $(mpi) 2>/dev/null) -ldnnl -luring -ldl -lm -lpthread

# ---- levels of the CPU's instruction set

ifneq ($(filter x86_64%,$(shell $(CC) -dumpmachine)),)
LEVELS := v2 v3 v4 v4bf16
endif
LEVELS ?= portable
march_v2       := -march=x86-64-v2
march_v3       := -march=x86-64-v3
march_v4       := -march=x86-64-v4
march_v4bf16   := -march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512
march_portable :=

# ---- what is built

single  := kernels/cpu/level.c kernels/cpu/dnnl.c
plugin  := $(wildcard runner/comm_nccl*.c)
once    := $(filter-out $(plugin),$(wildcard kernels/*.c runner/*.c $(single)))
leveled := $(filter-out $(single),$(wildcard kernels/cpu/*.c))
objects := $(once:%.c=$(BUILD)/%.o) \
           $(foreach level,$(LEVELS),$(leveled:%.c=$(BUILD)/%.$(level).o))
library := $(filter-out $(BUILD)/runner/main.o,$(objects))
tests   := $(patsubst %.c,$(BUILD)/%,$(wildcard tests/c/test_*.c))
fuzzers := $(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/*.c))
# what a kernel in a library of the user's own may include
headers := $(addprefix kernels/,tensor.h headers.h error.h dtype.h philox.h backend.h ops.def) runner/ds.h

.PHONY: all setup demo test test-hosts soak bench bench-peers lint format asan fuzz install clean help \
        c-tests fuzzers tests-built simt gpu-check gpu-bundle sanitize-cuda FORCE
.DELETE_ON_ERROR:
.SECONDARY:

all: $(BUILD)/dsrun

$(BUILD)/dsrun: $(objects) $(BUILD)/link.flags
	$(call quiet,link,$@)$(CC) $(LINK) -o $@ $(objects) $(LDLIBS)

c-tests: $(tests)

fuzzers: $(fuzzers:%=$(BUILD)/tests/fuzz/%)

$(BUILD)/tests/c/%: $(BUILD)/tests/c/%.o $(library) $(BUILD)/link.flags
	$(call quiet,link,$@)$(CC) $(LINK) -o $@ $< $(library) $(LDLIBS) -lcmocka

$(BUILD)/tests/fuzz/%: $(BUILD)/tests/fuzz/%.o $(library) $(BUILD)/link.flags
	$(call quiet,link,$@)$(CC) $(LINK) -fsanitize=fuzzer -o $@ $< $(library) $(LDLIBS)

$(BUILD)/%.o: %.c $(BUILD)/once.flags
	@mkdir -p $(@D)
	$(call quiet,cc,$<)$(CC) $(BASE) $(STRICT) $(CFLAGS) $(flags_$*) -MMD -MP -c -o $@ $<

# The kernels in kernels/cpu, once a level: softmax.c -> softmax.v3.o.
define level_rule
$(BUILD)/kernels/cpu/%.$(1).o: kernels/cpu/%.c $(BUILD)/kernel.flags
	@mkdir -p $$(@D)
	$$(call quiet,cc,$$< $(1))$$(CC) $$(BASE) $$(STRICT) $$(CFLAGS) $$(KERNEL) $$(march_$(1)) \
	  -DDS_LEVEL=$(1) -MMD -MP -c -o $$@ $$<
endef
$(foreach level,$(LEVELS),$(eval $(call level_rule,$(level))))

# One file sees MPI.
flags_runner/comm_mpi := $(shell pkg-config --cflags-only-I $(mpi) 2>/dev/null)

# The commit is told to one file only, so that committing does not rebuild the rest.
commit := $(shell GIT_OPTIONAL_LOCKS=0 git describe --always --dirty --abbrev=10 2>/dev/null || echo unknown)
flags_runner/version := -DDS_VERSION='"$(VERSION)"' -DDS_COMMIT='"$(commit)"' \
                        $(if $(SANITIZE),-DDS_SANITIZED='" with sanitizers"')
$(BUILD)/runner/version.o: $(BUILD)/version.flags

# Stamps: rewritten only when their text changes.
text_once    := $(CC) $(BASE) $(CFLAGS) $(shell $(CC) --version 2>/dev/null | head -n 1)
text_kernel  := $(text_once) $(KERNEL) $(march_v4bf16) $(LEVELS)
text_link    := $(CC) $(LINK) $(LDLIBS) $(objects)
text_version := $(VERSION) $(commit)
missing      := $(if $(shell pkg-config --exists $(packages) $(mpi) 2>/dev/null && echo no),,yes)
$(BUILD)/%.flags: FORCE
	@$(if $(missing),echo 'packages are missing: run make setup' >&2; exit 1)
	@mkdir -p $(@D)
	@echo '$(text_$*)' | cmp -s - $@ || echo '$(text_$*)' > $@

-include $(objects:.o=.d) $(tests:=.d) $(fuzzers:%=$(BUILD)/tests/fuzz/%.d)

# ---- CUDA: a plugin, libds_cuda.so, wherever nvcc and a C++ compiler are found; CUDA=0 builds without.
# Machine code for each of DSRUN_CUDA_ARCHS, and PTX of the first, which newer devices translate.
# NVCC_CCBIN: the host's compiler for it. ccache keeps nvcc's results, too, where it is installed.

ifneq ($(CUDA),0)
cuda_found := $(shell scripts/find-cuda | sed 's/ := /=/')
$(foreach line,$(cuda_found),$(eval $(subst =, := ,$(line))))
cuda_cxx := $(shell command -v $(firstword $(NVCC_CCBIN) $(CXX)) 2>/dev/null)
endif
DSRUN_CUDA_ARCHS ?= 80 90a
NVCC_LAUNCHER ?= $(if $(NVCC),$(shell command -v ccache 2>/dev/null))
cuda_first  := $(firstword $(DSRUN_CUDA_ARCHS))
cuda_codes  := $(foreach a,$(DSRUN_CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
               -gencode arch=compute_$(cuda_first),code=compute_$(cuda_first)
cuda_paths  := $(foreach d,$(sort $(CUDA_INCLUDE) $(CUDNN_INCLUDE) $(NCCL_INCLUDE)),-isystem $(d))
NVCCFLAGS   ?= -O3 -lineinfo
cuda_flags   = -std=c++17 -I. $(cuda_paths) $(NVCCFLAGS) $(cuda_codes) -Xcompiler -fPIC,-Wall,-Wextra \
               $(if $(NVCC_CCBIN),-ccbin $(NVCC_CCBIN)) $(if $(WERROR),--Werror all-warnings)
cuda_sources := $(wildcard kernels/cuda/*.cu)
cuda_objects := $(cuda_sources:%.cu=$(BUILD)/%.o)
ifneq ($(NCCL_INCLUDE),)
cuda_objects += $(plugin:%.c=$(BUILD)/cuda/%.o)
nccl_simt    := $(BUILD)/simt/libnccl.so.2
endif

# Sanitizers are for the simulated device: nvcc's code has compute-sanitizer (make sanitize-cuda).
ifneq ($(and $(NVCC),$(CUDA_LIB),$(if $(SANITIZE),,yes)),)
ifneq ($(cuda_cxx),)
backend := $(BUILD)/libds_cuda.so
else
$(warning nvcc is here, but no C++ compiler: there will be no CUDA backend (make setup installs one))
endif
endif
all: $(backend)

tests-built: all c-tests $(if $(and $(CUDA_INCLUDE),$(cuda_cxx)),simt)

# cuBLASLt is linked; cuDNN and NCCL are opened when they are wanted. The driver is never linked.
$(BUILD)/libds_cuda.so: $(cuda_objects) $(BUILD)/cuda.flags
	$(call quiet,link,$@)$(NVCC) -shared -cudart static -o $@ $(cuda_objects) $(CUBLASLT) -L$(CUDA_LIB) \
	  -Xlinker -rpath,'$$ORIGIN:$(CUDA_LIB)$(if $(NCCL_LIB),:$(NCCL_LIB))'

# Its files that are no kernels.
$(BUILD)/cuda/%.o: %.c $(BUILD)/cuda.flags
	@mkdir -p $(@D)
	$(call quiet,cc,$<)$(CC) $(BASE) $(STRICT) $(CFLAGS) $(cuda_paths) -fPIC -MMD -MP -c -o $@ $<

$(BUILD)/%.o: %.cu $(BUILD)/cuda.flags
	@mkdir -p $(@D)
	$(call quiet,nvcc,$<)$(NVCC_LAUNCHER) $(NVCC) $(cuda_flags) -MMD -MP -c -o $@ $<

# The same sources for the host, with threads that are simulated: tests where there is no GPU.
simt_alone   := tests/simt/nccl.cpp
simt_objects := $(cuda_sources:%.cu=$(BUILD)/simt/%.o) \
                $(patsubst tests/simt/%.cpp,$(BUILD)/simt/tests/%.o,$(filter-out $(simt_alone),$(wildcard tests/simt/*.cpp))) \
                $(if $(NCCL_INCLUDE),$(plugin:%.c=$(BUILD)/simt/%.o))
simt_flags    = -std=c++17 -I. -DDS_SIMT $(cuda_paths) -Wall -Wextra $(STRICT) -fPIC -O2 -g \
                -fno-strict-aliasing -Wno-unknown-pragmas $(CHECKED)

simt: $(BUILD)/simt/libds_cuda.so $(nccl_simt)

$(BUILD)/simt/libds_cuda.so: $(simt_objects) $(BUILD)/simt.flags
	$(call quiet,link,$@)$(CXX) -shared -Wl,-Bsymbolic $(CHECKED) -o $@ $(simt_objects) \
	  -Wl,--disable-new-dtags,-rpath,'$$ORIGIN'

# In NCCL's place, and found before it, as the folder is looked at before LD_LIBRARY_PATH.
$(BUILD)/simt/libnccl.so.2: $(BUILD)/simt/tests/nccl.o $(BUILD)/simt/libds_cuda.so
	$(call quiet,link,$@)$(CXX) -shared $(CHECKED) -o $@ $< -L$(@D) -l:libds_cuda.so -Wl,-rpath,'$$ORIGIN'

$(BUILD)/simt/%.o: %.c $(BUILD)/simt.flags
	@mkdir -p $(@D)
	$(call quiet,simt,$<)$(CC) $(BASE) $(STRICT) $(CFLAGS) $(cuda_paths) -fPIC -MMD -MP -c -o $@ $<

$(BUILD)/simt/%.o: %.cu $(BUILD)/simt.flags
	@mkdir -p $(@D)
	$(call quiet,simt,$<)$(CXX) -x c++ $(simt_flags) -include tests/simt/simt.h -MMD -MP -c -o $@ $<

# What stands in for libraries may copy no bytes from nowhere: an empty std::vector is there.
$(BUILD)/simt/tests/%.o: tests/simt/%.cpp $(BUILD)/simt.flags
	@mkdir -p $(@D)
	$(call quiet,simt,$<)$(CXX) $(simt_flags) $(if $(SANITIZE),-fno-sanitize=nonnull-attribute) -MMD -MP -c -o $@ $<

# Whether cuDNN takes the graphs that are built: it is asked where there is no GPU, with the toolkit's
# stub in the driver's place.
ifneq ($(and $(CUDNN_LIB),$(cuda_cxx),$(wildcard $(CUDA_LIB)/stubs/libcuda.so)),)
c-tests: $(BUILD)/tests/c/test_cudnn $(BUILD)/stub/libcuda.so.1
endif

cudnn_sources := tests/c/test_cudnn.cpp $(patsubst %,kernels/cuda/%.cu,cudnn attention_form attention_graph)

$(BUILD)/tests/c/test_cudnn: $(cudnn_sources) kernels/cuda/cudnn.h kernels/cuda/attention_graph.h
	@mkdir -p $(@D)
	$(call quiet,link,$@)$(CXX) -x c++ -std=c++17 -I. $(cuda_paths) -Wall -Wextra $(STRICT) $(CHECKED) -g \
	  -o $@ $(cudnn_sources) -ldl

$(BUILD)/stub/libcuda.so.1:
	@mkdir -p $(@D)
	@ln -sf $(CUDA_LIB)/stubs/libcuda.so $@

text_cuda := $(NVCC) $(if $(NVCC),$(shell $(NVCC) --version | tail -n 1)) $(cuda_flags) $(CUBLASLT) $(cuda_objects)
text_simt := $(CXX) $(simt_flags) $(simt_objects)
-include $(cuda_objects:.o=.d) $(simt_objects:.o=.d) $(BUILD)/simt/tests/nccl.d

# ---- targets

setup:
	@scripts/setup test hosts lint

demo:
	@scripts/setup demo
	@$(MAKE) all
	$(BUILD)/dsrun models/gpt/train.lua
	$(BUILD)/dsrun models/gpt/sample.lua

test:
	@scripts/setup test hosts
	@$(MAKE) tests-built
	@BUILD=$(BUILD) scripts/test

test-hosts:
	@scripts/setup hosts
	@$(MAKE) all
	@BUILD=$(BUILD) tests/hosts/run

lint:
	@scripts/setup lint
	@scripts/lint

format:
	scripts/headers --write
	clang-format -i $(shell find kernels runner tests models -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp')

asan:
	@scripts/setup test hosts
	@$(MAKE) BUILD=build/asan SANITIZE=address,undefined CFLAGS='-O1 -g' tests-built
	@BUILD=build/asan scripts/test

fuzz:
	@scripts/setup lint
	@$(MAKE) BUILD=build/fuzz CC=clang SANITIZE=address,undefined,fuzzer-no-link CFLAGS='-O1 -g' fuzzers
	@for f in $(fuzzers); do \
	  mkdir -p build/fuzz/corpus/$$f && echo "fuzzing $$f for $(FUZZ_SECONDS) s" && \
	  build/fuzz/tests/fuzz/$$f -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=4096 -verbosity=0 \
	    $$(test ! -f tests/fuzz/$$f.dict || echo -dict=tests/fuzz/$$f.dict) -timeout=10 \
	    -artifact_prefix=build/fuzz/$$f- build/fuzz/corpus/$$f tests/fuzz/seeds/$$f || exit 1; done

soak:
	@scripts/setup test hosts soak lint
	@$(MAKE) all c-tests
	@BUILD=$(BUILD) scripts/soak

bench: all
	@scripts/bench

# On a machine with a GPU. What is built elsewhere can be taken there: make gpu-bundle.
gpu-check:
	@$(if $(wildcard build/gpu-bundle),true,$(MAKE) all)
	@scripts/gpu-check

sanitize-cuda: all
	@scripts/gpu-check sanitizer

gpu-bundle: all
	@BUILD=$(BUILD) scripts/gpu-bundle

bench-peers:
	@scripts/bench-peers

install: all
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(PREFIX)/share/dsrun'
	install -m 755 $(BUILD)/dsrun '$(DESTDIR)$(PREFIX)/bin/dsrun'
	find lua models -type f ! -name '.*' -exec install -D -m 644 {} '$(DESTDIR)$(PREFIX)/share/dsrun/{}' \;
	for f in $(headers); do install -D -m 644 $$f '$(DESTDIR)$(PREFIX)/include/dsrun/'$$f || exit 1; done
	$(if $(backend),install -D -m 755 $(backend) '$(DESTDIR)$(PREFIX)/lib/dsrun/libds_cuda.so')

clean:
	rm -rf $(BUILD)

help:
	@echo 'make            build $(BUILD)/dsrun (make setup first installs what that needs)'
	@echo 'make demo       install what is missing, build, train a character GPT, print a sample'
	@echo 'make test       install what is missing, build, run the tests'
	@echo 'make test-hosts jobs on several hosts, which are made out of this machine (as part of make test)'
	@echo 'make lint       luacheck, clang-format, clang with warnings as errors, layers'
	@echo 'make format     clang-format over all C, and the number of the headers (scripts/headers)'
	@echo 'make asan       the tests under the address and undefined-behaviour sanitizers, with the simulated GPU'
	@echo 'make fuzz       fuzz the readers of files, FUZZ_SECONDS=$(FUZZ_SECONDS) each'
	@echo 'make soak       a long run of everything, SOAK_MINUTES=12; writes tests/SOAK.md'
	@echo 'make bench      benchmarks, beside PyTorch and DeepSpeed, if make bench-peers has run'
	@echo 'make install    PREFIX=$(PREFIX) DESTDIR=$(DESTDIR)'
	@echo 'make simt       the CUDA backend for threads that are simulated, which its tests run on'
	@echo 'make gpu-check  on a machine with a GPU: tests, benchmarks beside PyTorch; results in build/gpu'
	@echo 'make gpu-bundle all that gpu-check needs in one folder, to be taken to such a machine'
	@echo 'make sanitize-cuda   the tests of the CUDA backend under compute-sanitizer; needs a GPU'
	@echo 'make clean'
	@echo 'CC=clang, BUILD=folder, WERROR=1, V=1 (print commands), SANITIZE=address,undefined, CFLAGS=… as you like'
	@echo 'CUDA=0 (without it), CUDA_HOME, CUDNN_HOME, NCCL_HOME=folder, DSRUN_CUDA_ARCHS="$(DSRUN_CUDA_ARCHS)", NVCC_CCBIN=g++-12'
