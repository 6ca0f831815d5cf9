// lrs_ext._C: addresses, sizes and streams in, kernels out. It neither includes nor links torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "known_groups.h"
#include "schedules.h"
#include "step_cpu.h"
#include "step_tensors.h"
#include "tensor_table.h"
#ifdef LRS_WITH_CUDA
#include "step_cuda.h"
#endif

namespace {

namespace py = pybind11;
using namespace pybind11::literals;

const std::map<std::string, lrs::Profile> kProfiles = {
    {"constant", lrs::Profile::kConstant},
    {"linear", lrs::Profile::kLinear},
    {"cosine", lrs::Profile::kCosine},
    {"rex", lrs::Profile::kRex},
    {"exponential", lrs::Profile::kExponential},
    {"step_decay", lrs::Profile::kStepDecay},
    {"delayed_linear", lrs::Profile::kDelayedLinear},
    {"polynomial", lrs::Profile::kPolynomial},
    {"one_cycle", lrs::Profile::kOneCycle},
    {"wsd", lrs::Profile::kWarmupStableDecay},
    {"inverse_sqrt", lrs::Profile::kInverseSqrt}};

const std::map<std::string, lrs::Profile> kCooldowns = {
    {"sqrt", lrs::Profile::kOneMinusSqrt},
    {"linear", lrs::Profile::kLinear},
    {"cosine", lrs::Profile::kCosine},
    {"exponential", lrs::Profile::kExponential}};

const std::map<std::string, lrs::Algorithm> kAlgorithms = {{"sgd", lrs::Algorithm::kSGD},
                                                           {"adam", lrs::Algorithm::kAdam},
                                                           {"lion", lrs::Algorithm::kLion},
                                                           {"lamb", lrs::Algorithm::kLAMB}};

const std::map<std::string, lrs::StateType> kStateTypes = {{"float32", lrs::StateType::kFloat32},
                                                           {"bfloat16", lrs::StateType::kBFloat16},
                                                           {"block8", lrs::StateType::kBlock8}};

const std::map<std::string, lrs::Passes> kPasses = {{"both", lrs::Passes::kBoth},
                                                    {"moments", lrs::Passes::kMoments},
                                                    {"params", lrs::Passes::kParams}};

const std::map<std::string, int> kHyper = {{"weight_decay", lrs::kWeightDecay},
                                           {"maximize", lrs::kMaximize},
                                           {"beta1", lrs::kBeta1},
                                           {"beta2", lrs::kBeta2},
                                           {"eps", lrs::kEps},
                                           {"decoupled_weight_decay", lrs::kDecoupled},
                                           {"always_adapt", lrs::kAlwaysAdapt},
                                           {"bias_correction", lrs::kBiasCorrection},
                                           {"momentum", lrs::kMomentum},
                                           {"dampening", lrs::kDampening},
                                           {"nesterov", lrs::kNesterov}};

const std::map<std::string, lrs::MovingNumber lrs::Group::*> kMoving = {
    {"weight_decay", &lrs::Group::weight_decay},
    {"momentum", &lrs::Group::momentum},
    {"beta1", &lrs::Group::momentum}};

template <typename T>
T at(const std::map<std::string, T>& map, const std::string& name) {
  const auto found = map.find(name);
  if (found == map.end()) throw py::key_error(name);
  return found->second;
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A schedule that owns its sample points and, behind them, its milestones.
class Schedule {
 public:
  Schedule(const std::string& profile, double lr, double min_lr, int64_t total_steps,
           int64_t warmup_steps, int64_t sampling, const std::vector<double>& fractions,
           double shape, const std::vector<double>& milestones, const std::string& cooldown)
      : spec_{} {
    spec_.profile = at(kProfiles, profile);
    spec_.lr = lr;
    spec_.min_lr = min_lr;
    spec_.total_steps = total_steps;
    spec_.warmup_steps = warmup_steps;
    spec_.sampling = sampling;
    spec_.num_sample_points = static_cast<int64_t>(fractions.size());
    spec_.shape = shape;
    spec_.num_milestones = static_cast<int64_t>(milestones.size());
    spec_.cooldown = at(kCooldowns, cooldown);
    for (const auto* shares : {&fractions, &milestones}) {
      for (const double share : *shares) {
        points_.push_back(lrs::sample_point(share, total_steps - warmup_steps));
      }
    }
  }

  // With a copy of `points()`, which may be on a device.
  lrs::ScheduleSpec spec(const int64_t* points) const {
    lrs::ScheduleSpec spec = spec_;
    if (spec.num_sample_points > 0) spec.sample_points = points;
    spec.milestones = points + spec.num_sample_points;
    return spec;
  }

  double value(int64_t step) const { return lrs::schedule_value(spec(points_.data()), step); }

  py::array_t<double> values(int64_t start, int64_t stop) const {
    py::array_t<double> values(stop - start);
    lrs::fill_schedule(spec(points_.data()), start, stop - start, values.mutable_data());
    return values;
  }

  void fill_cpu(uintptr_t target, int64_t count) const {
    lrs::fill_schedule(spec(points_.data()), 0, count, pointer<float>(target));
  }

  const std::vector<int64_t>& points() const { return points_; }

 private:
  lrs::ScheduleSpec spec_;
  std::vector<int64_t> points_;
};

// Of each moving hyper-parameter: address and length of its float32 values, one a step.
using MovingNumbers = std::map<std::string, std::pair<uintptr_t, int64_t>>;

lrs::Group make_group(uintptr_t lr, int64_t capacity, const std::map<std::string, double>& hyper,
                      const MovingNumbers& moving) {
  lrs::Group group{pointer<const float>(lr), capacity, {}, {}, {}};
  for (const auto& [name, value] : hyper) group.hyper[at(kHyper, name)] = value;
  for (const auto& [name, row] : moving) {
    group.*at(kMoving, name) = {pointer<const float>(row.first), row.second};
  }
  return group;
}

lrs::TensorAccess make_tensor_access(const py::capsule& exchange_api,
                                     const py::function& make_handles, uintptr_t data_pointer,
                                     uintptr_t delete_handle, const py::function& is_negated,
                                     const py::tuple& plain_types,
                                     const py::function& has_function_mode) {
  auto* exchange = static_cast<lrs::dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(exchange_api.ptr(), lrs::dlpack::kCapsuleName));
  if (exchange == nullptr) throw py::error_already_set();
  while (exchange != nullptr && exchange->major_version != lrs::dlpack::kMajorVersion) {
    exchange = exchange->previous;
  }
  if (exchange == nullptr) {
    throw std::runtime_error("torch offers no DLPack exchange interface of version 1");
  }
  return {exchange,
          make_handles,
          reinterpret_cast<int32_t (*)(lrs::TensorPointer, void**)>(data_pointer),
          reinterpret_cast<int32_t (*)(void*)>(delete_handle),
          is_negated,
          std::nullopt,
          plain_types,
          has_function_mode};
}

// A step that is ready to run: the live tensors, their chunks, and the addresses of the tables.
class Step {
 public:
  Step(const std::string& algorithm, lrs::StepTensors* tensors, int64_t chunk_elements,
       const std::string& state_type, bool rounds_stochastically)
      : tensors_(tensors), table_{} {
    if (chunk_elements % lrs::kQuantBlock != 0) {
      throw std::invalid_argument("a chunk must be a whole number of quantisation blocks");
    }
    std::vector<int64_t> numels;
    for (const lrs::TensorEntry& entry : tensors->entries()) numels.push_back(entry.numel);
    lrs::build_chunks(numels, chunk_elements, &chunks_, &chunk_offsets_);
    table_.algorithm = at(kAlgorithms, algorithm);
    table_.state_type = at(kStateTypes, state_type);
    table_.rounds_stochastically = rounds_stochastically;
    table_.tensors = table_.host_tensors = tensors->entries().data();
    table_.num_tensors = static_cast<int64_t>(numels.size());
    table_.chunks = chunks_.data();
    table_.num_chunks = static_cast<int64_t>(chunks_.size());
    table_.chunk_elements = chunk_elements;
  }

  void bind(uintptr_t groups, uintptr_t step) {
    table_.groups = pointer<const lrs::Group>(groups);
    table_.step = pointer<int64_t>(step);
  }

  // Gives LAMB room for two doubles per chunk and then per tensor, on the parameters' device.
  void bind_squares(uintptr_t squares) {
    table_.chunk_squares = pointer<lrs::Squares>(squares);
    table_.tensor_squares = table_.chunk_squares + table_.num_chunks;
  }

  // Chooses the passes of LAMB that the next runs make: a key of `kPasses`.
  void choose_passes(const std::string& passes) { table_.passes = at(kPasses, passes); }

  // Points the table to copies of its parts in device memory.
  void bind_device(uintptr_t tensors, uintptr_t chunks, uintptr_t ticket) {
    table_.tensors = pointer<const lrs::TensorEntry>(tensors);
    table_.chunks = pointer<const lrs::Chunk>(chunks);
    table_.ticket = pointer<uint32_t>(ticket);
  }

  // Addresses of one float32 each, of the backend's kind; 0 where there is nothing to read.
  void scale_gradients(uintptr_t loss_scale, uintptr_t found_inf, uintptr_t norm,
                       uintptr_t max_norm) {
    table_.scaling = {pointer<const float>(loss_scale), pointer<const float>(found_inf),
                      pointer<const float>(norm), pointer<const float>(max_norm)};
  }

  py::array_t<int64_t> tensor_rows() const {
    static_assert(sizeof(lrs::TensorEntry) % sizeof(int64_t) == 0);
    constexpr py::ssize_t kColumns = sizeof(lrs::TensorEntry) / sizeof(int64_t);
    return py::array_t<int64_t>({static_cast<py::ssize_t>(tensors_->entries().size()), kColumns},
                                reinterpret_cast<const int64_t*>(tensors_->entries().data()));
  }

  py::array_t<int32_t> chunk_rows() const {
    return py::array_t<int32_t>({static_cast<py::ssize_t>(chunks_.size()), py::ssize_t{2}},
                                reinterpret_cast<const int32_t*>(chunks_.data()));
  }

  py::array_t<int64_t> gradient_addresses() const {
    const auto& gradients = tensors_->gradients();
    return py::array_t<int64_t>(static_cast<py::ssize_t>(gradients.size()),
                                reinterpret_cast<const int64_t*>(gradients.data()));
  }

  // `commits_step`: whether the schedules advance.
  void run_cpu(int num_threads, bool commits_step) {
    table_.commits_step = commits_step;
    {
      const py::gil_scoped_release release;
      lrs::step_cpu(table_, tensors_->gradients().data(), num_threads);
    }
    tensors_->release_gradients();
  }

  void grad_norm_cpu(uintptr_t norm, int num_threads) {
    sums_.resize(chunks_.size());
    {
      const py::gil_scoped_release release;
      *pointer<float>(norm) =
          lrs::grad_norm_cpu(table_, tensors_->gradients().data(), sums_.data(), num_threads);
    }
    tensors_->release_gradients();
  }

#ifdef LRS_WITH_CUDA
  // Returns the stream that reads the tables, as the next one does.
  uintptr_t grad_norm_cuda(uintptr_t sums, uintptr_t norm) const {
    void* stream = tensors_->current_stream();
    {
      const py::gil_scoped_release release;
      lrs::grad_norm_cuda(table_, chunk_offsets_.data(), tensors_->gradients().data(),
                          pointer<double>(sums), pointer<float>(norm), tensors_->device_index(),
                          stream);
    }
    tensors_->release_gradients();
    return reinterpret_cast<uintptr_t>(stream);
  }

  uintptr_t run_cuda(bool commits_step) {
    table_.commits_step = commits_step;
    void* stream = tensors_->current_stream();
    {
      const py::gil_scoped_release release;  // a launch waits while the queue is full
      lrs::step_cuda(table_, chunk_offsets_.data(), tensors_->gradients().data(),
                     tensors_->device_index(), stream);
    }
    tensors_->release_gradients();
    return reinterpret_cast<uintptr_t>(stream);
  }
#endif

 private:
  lrs::StepTensors* tensors_;
  lrs::StepTable table_;
  std::vector<lrs::Chunk> chunks_;
  std::vector<int64_t> chunk_offsets_;
  std::vector<double> sums_;  // scratch
};

// The ranges that the kernels visit, for tests: (begin, vector begin, vector end, end) per chunk.
std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> chunk_ranges(
    int64_t numel, int64_t chunk_elements, int64_t lane, const std::vector<uint64_t>& addresses,
    const std::vector<int>& bytes) {
  if (addresses.size() != 3 || bytes.size() != 3) {
    throw std::invalid_argument("addresses and bytes must have 3 entries each");
  }
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> ranges;
  const uint64_t address_array[3] = {addresses[0], addresses[1], addresses[2]};
  const int byte_array[3] = {bytes[0], bytes[1], bytes[2]};
  const int64_t count = lrs::num_chunks_of(numel, chunk_elements);
  for (int64_t index = 0; index < count; ++index) {
    const lrs::Range range = lrs::chunk_range(numel, chunk_elements, index);
    const lrs::Range vector = lrs::vector_range(range, lane, address_array, byte_array);
    ranges.emplace_back(range.begin, vector.begin, vector.end, range.end);
  }
  return ranges;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of lrs_ext: schedules, step tables and step kernels.";

  py::class_<Schedule>(m, "Schedule")
      .def(py::init<const std::string&, double, double, int64_t, int64_t, int64_t,
                    const std::vector<double>&, double, const std::vector<double>&,
                    const std::string&>(),
           py::kw_only(), "profile"_a, "lr"_a, "min_lr"_a, "total_steps"_a, "warmup_steps"_a,
           "sampling"_a, "fractions"_a, "shape"_a, "milestones"_a, "cooldown"_a)
      .def("value", &Schedule::value, "step"_a)
      .def("values", &Schedule::values, "start"_a, "stop"_a)
      .def("fill_cpu", &Schedule::fill_cpu, "target"_a, "count"_a)
#ifdef LRS_WITH_CUDA
      .def(
          "fill_cuda",
          [](const Schedule& schedule, uintptr_t target, int64_t count, uintptr_t points,
             int device, uintptr_t stream) {
            lrs::fill_schedule_cuda(schedule.spec(pointer<const int64_t>(points)), count,
                                    pointer<float>(target), device, pointer<void>(stream));
          },
          py::kw_only(), "target"_a, "count"_a, "points"_a, "device"_a, "stream"_a)
#endif
      .def_property_readonly("points", &Schedule::points);

  py::class_<lrs::TensorAccess>(m, "TensorAccess")
      .def(py::init(&make_tensor_access), "exchange_api"_a, "make_handles"_a, "data_pointer"_a,
           "delete_handle"_a, "is_negated"_a, "plain_types"_a, "has_function_mode"_a)
      .def("use_direct", &lrs::TensorAccess::use_direct, "functions"_a, "probe"_a)
      .def_property_readonly(
          "is_direct", [](const lrs::TensorAccess& access) { return access.direct.has_value(); });

  py::class_<lrs::StepTensors>(m, "StepTensors")
      .def(py::init([](const lrs::TensorAccess& access, const py::list& param_lists,
                       const py::dict& state, const py::list& state_names, const py::list& steps,
                       const std::string& state_type, const std::vector<int64_t>& positions) {
             return std::make_unique<lrs::StepTensors>(access, param_lists, state, state_names,
                                                       steps, at(kStateTypes, state_type),
                                                       positions);
           }),
           "access"_a, "param_lists"_a, "state"_a, "state_names"_a, "steps"_a,
           "state_type"_a = "float32", "positions"_a = std::vector<int64_t>(),
           py::keep_alive<1, 2>())
      .def("refresh", &lrs::StepTensors::refresh, "param_lists"_a, "state"_a, "gradients"_a)
      .def("release_gradients", &lrs::StepTensors::release_gradients)
      .def_property_readonly("has_gradients", &lrs::StepTensors::has_gradients)
      .def("count_update", &lrs::StepTensors::count_update)
      .def("updated_params", &lrs::StepTensors::updated_params);

  py::class_<lrs::KnownGroups>(m, "KnownGroups")
      .def(py::init<>())
      .def("look_at", &lrs::KnownGroups::look_at, "groups"_a, "schedules"_a)
      .def("confirm", &lrs::KnownGroups::confirm)
      .def("forget", &lrs::KnownGroups::forget)
      .def("are_unchanged", &lrs::KnownGroups::are_unchanged, "groups"_a, "schedules"_a)
      .def("change", &lrs::KnownGroups::change<py::function>, "groups"_a, "change"_a)
      .def("put", &lrs::KnownGroups::put, "groups"_a, "key"_a, "values"_a);

  py::class_<Step>(m, "Step")
      .def(py::init<const std::string&, lrs::StepTensors*, int64_t, const std::string&, bool>(),
           "algorithm"_a, "tensors"_a, "chunk_elements"_a, "state_type"_a = "float32",
           "rounds_stochastically"_a = false, py::keep_alive<1, 3>())
      .def("bind", &Step::bind, "groups"_a, "step"_a)
      .def("bind_squares", &Step::bind_squares, "squares"_a)
      .def("choose_passes", &Step::choose_passes, "passes"_a)
      .def("bind_device", &Step::bind_device, "tensors"_a, "chunks"_a, "ticket"_a)
      .def("scale_gradients", &Step::scale_gradients, py::kw_only(), "loss_scale"_a, "found_inf"_a,
           "norm"_a, "max_norm"_a)
      .def_property_readonly("tensor_rows", &Step::tensor_rows)
      .def_property_readonly("chunk_rows", &Step::chunk_rows)
      .def_property_readonly("gradient_addresses", &Step::gradient_addresses)
#ifdef LRS_WITH_CUDA
      .def("run_cuda", &Step::run_cuda, "commits_step"_a = true)
      .def("grad_norm_cuda", &Step::grad_norm_cuda, "sums"_a, "norm"_a)
#endif
      .def("grad_norm_cpu", &Step::grad_norm_cpu, "norm"_a, "num_threads"_a)
      .def("run_cpu", &Step::run_cpu, "num_threads"_a, "commits_step"_a = true);

  m.def(
      "write_group_cpu",
      [](uintptr_t target, uintptr_t lr, int64_t capacity,
         const std::map<std::string, double>& hyper, const MovingNumbers& moving) {
        *pointer<lrs::Group>(target) = make_group(lr, capacity, hyper, moving);
      },
      "target"_a, "lr"_a, "capacity"_a, "hyper"_a, "moving"_a = MovingNumbers());
#ifdef LRS_WITH_CUDA
  m.def(
      "write_group_cuda",
      [](uintptr_t target, uintptr_t lr, int64_t capacity,
         const std::map<std::string, double>& hyper, const MovingNumbers& moving, int device,
         uintptr_t stream) {
        lrs::write_group_cuda(pointer<lrs::Group>(target), make_group(lr, capacity, hyper, moving),
                              device, pointer<void>(stream));
      },
      "target"_a, "lr"_a, "capacity"_a, "hyper"_a, "moving"_a, "device"_a, "stream"_a);
  m.def("cuda_unavailable_reason", &lrs::cuda_unavailable_reason);
  m.def("memory_bandwidth", &lrs::memory_bandwidth, "device"_a);
  m.attr("cuda_runtime_version") = lrs::cuda_runtime_version();
  m.attr("cuda_architectures") = LRS_CUDA_ARCHS;
#endif
  m.attr("has_cuda") =
#ifdef LRS_WITH_CUDA
      true;
#else
      false;
#endif

  m.def("cpu_instruction_set", &lrs::cpu_instruction_set);
  m.def("chunk_ranges", &chunk_ranges, "numel"_a, "chunk_elements"_a, "lane"_a, "addresses"_a,
        "bytes"_a);
  m.attr("group_bytes") = sizeof(lrs::Group);
  m.attr("quant_block") = lrs::kQuantBlock;
  m.attr("changed_while_read") = lrs::StepTensors::kChanged;
  std::vector<std::string> profiles, cooldowns, algorithms;
  for (const auto& [name, profile] : kProfiles) profiles.push_back(name);
  for (const auto& [name, cooldown] : kCooldowns) cooldowns.push_back(name);
  for (const auto& [name, algorithm] : kAlgorithms) algorithms.push_back(name);
  m.attr("profiles") = profiles;
  m.attr("cooldowns") = cooldowns;
  m.attr("algorithms") = algorithms;
}
