// karma_fast._C: what karma_fast.evaluation.ranks calls. Lists and lengths are checked there and, so that no call can
// read outside an array, here again.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "count.h"
#include "cpu.h"
#include "top_k.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Lists = std::pair<Array<int64_t>, Array<int64_t>>;  // list i: second[first[i]..first[i + 1]]
using karma::Rows;

[[noreturn]] void refuse(const std::string& text) { throw py::value_error(text); }

const karma::Kernel& kernel_named(const std::string& name) {
  const karma::Kernel* found = karma::kernel_named(name.c_str());
  if (found) return *found;
  std::string known;
  for (const karma::Kernel* k : karma::kernels()) known += std::string(known.empty() ? "" : ", ") + k->name;
  refuse("path: got '" + name + "'; this machine can run " + known);
}

const karma::Basics& basics() { return *karma::kernels().front()->basics; }

Rows rows_of(const py::array& x, const std::string& storage) {
  const bool wide = storage == "float32", half = storage == "float16";
  if (!wide && !half && storage != "bfloat16") refuse("storage: got '" + storage + "'");
  const bool fits = wide   ? py::isinstance<py::array_t<float>>(x)
                    : half ? x.dtype().equal(py::dtype("float16"))
                           : py::isinstance<py::array_t<uint16_t>>(x);
  constexpr int plain = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if (!fits || x.ndim() != 2 || (x.flags() & plain) != plain)
    refuse("items: contiguous rows of " + storage + " are needed, bfloat16 as uint16");
  if (x.shape(1) < 1 || x.shape(1) > 65536) refuse("items: the width must be 1 to 65536");
  return {x.data(),
          wide   ? karma::Storage::float32
          : half ? karma::Storage::float16
                 : karma::Storage::bfloat16,
          x.shape(0), x.shape(1)};
}

void check_queries(const Array<float>& queries, int64_t width) {
  if (queries.ndim() != 2 || queries.shape(1) != width)
    refuse("queries: (rows, " + std::to_string(width) + ") is needed");
}

void check_inside(const char* name, const Array<int64_t>& x, int64_t least, int64_t end) {
  const int64_t* v = x.data();
  for (py::ssize_t i = 0; i < x.size(); ++i)
    if (v[i] < least || v[i] >= end)
      refuse(std::string(name) + ": got " + std::to_string(v[i]) + "; " + std::to_string(least) + " to " +
             std::to_string(end - 1) + " is allowed");
}

void check_lists(const char* name, const Array<int64_t>& first, int64_t lists, int64_t entries) {
  bool fits = lists >= 0 && first.ndim() == 1 && first.size() == lists + 1 && first.data()[0] == 0 &&
              first.data()[lists] == entries;
  for (int64_t i = 0; fits && i < lists; ++i) fits = first.data()[i] <= first.data()[i + 1];
  if (!fits)
    refuse(std::string(name) + ": must rise from 0 to the number of entries, one more than there are queries");
}

void check_rising(const char* name, const Array<int64_t>& first, const Array<int64_t>& x) {
  for (py::ssize_t list = 0; list + 1 < first.size(); ++list)
    for (int64_t i = first.data()[list] + 1; i < first.data()[list + 1]; ++i)
      if (x.data()[i - 1] >= x.data()[i]) refuse(std::string(name) + ": each list must rise");
}

// What is written must not be what is read, or written twice.
void check_apart(const char* name, const py::array& written, std::initializer_list<const py::array*> others) {
  const char* begin = static_cast<const char*>(written.data());
  for (const py::array* other : others) {
    const char* start = static_cast<const char*>(other->data());
    if (begin < start + other->nbytes() && start < begin + written.nbytes())
      refuse(std::string(name) + ": shares memory with another argument");
  }
}

// What array_t leaves unchecked of arrays that it does not copy.
void check_aligned(std::initializer_list<const py::array*> arrays) {
  for (const py::array* x : arrays)
    if (!(x->flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_))
      refuse("arrays: one of type " + std::string(py::str(x->dtype())) + " is not aligned to its numbers; copy it");
}

void check_scores(const Array<float>& score) {
  for (py::ssize_t i = 0; i < score.size(); ++i)
    if (!std::isfinite(score.data()[i])) refuse("score: target " + std::to_string(i) + " has none");
}

template <class T>
void check_size(const char* name, const Array<T>& x, int64_t size) {
  if (x.ndim() != 1 || x.size() != size)
    refuse(std::string(name) + ": " + std::to_string(size) + " entries are needed");
}

// Keeps the caller's rows alive beside the packed copies.
class Items {
 public:
  Items(py::array rows, const std::string& storage, const std::string& path, int64_t begin, int64_t end, int threads)
      : array_(std::move(rows)), rows_(rows_of(array_, storage)) {
    if (begin < 0 || begin > end || end > rows_.count) refuse("items: the range must lie within the rows");
    const karma::Kernel& kernel = kernel_named(path);
    const py::gil_scoped_release release;
    packed_ = std::make_unique<karma::Packed>(kernel, rows_, begin, end, threads);
  }

  void count(const Array<float>& queries, const Array<int64_t>& first, const Array<int64_t>& item,
             const Array<float>& score, int64_t begin, int64_t end, Array<int64_t> greater, Array<int64_t> equal,
             int threads) const {
    check_aligned({&queries, &first, &item, &score, &greater, &equal});
    check_queries(queries, rows_.width);
    check_lists("targets", first, queries.shape(0), item.size());
    check_size("targets", item, item.size());
    check_size("score", score, item.size());
    check_size("greater", greater, item.size());
    check_size("equal", equal, item.size());
    check_inside("item", item, -1, rows_.count);
    check_scores(score);
    check_apart("greater", greater, {&queries, &first, &item, &score, &equal, &array_});
    check_apart("equal", equal, {&queries, &first, &item, &score, &array_});
    if (begin < packed_->begin || begin > end || end > packed_->end)
      refuse("begin and end: must lie within what was packed");
    const karma::Targets targets{queries.shape(0), queries.data(), first.data(), item.data(), score.data()};
    int64_t *above = greater.mutable_data(), *level = equal.mutable_data();
    const py::gil_scoped_release release;
    karma::count_ranks(*packed_, rows_, targets, begin, end, above, level, threads);
  }

  void top_k(const Array<float>& queries, const std::optional<Lists>& left_out, Array<float> scores,
             Array<int64_t> items, int threads) const {
    check_aligned({&queries, &scores, &items});
    check_queries(queries, rows_.width);
    const bool fits = scores.ndim() == 2 && items.ndim() == 2 && scores.shape(0) == queries.shape(0) &&
                      items.shape(0) == scores.shape(0) && items.shape(1) == scores.shape(1) && scores.shape(1) >= 1;
    if (!fits) refuse("scores and items: (queries, k) is needed");
    if (packed_->end - packed_->begin > 0xffffffff) refuse("items: more than 2^32 at a time; give them in parts");
    check_apart("scores", scores, {&queries, &items, &array_});
    check_apart("items", items, {&queries, &array_});
    const karma::Best best{queries.shape(0), scores.shape(1), scores.mutable_data(), items.mutable_data()};
    const int64_t *firsts = nullptr, *out = nullptr;
    if (left_out) {
      const auto& [first, listed] = *left_out;
      check_aligned({&first, &listed});
      check_lists("left_out", first, queries.shape(0), listed.size());
      check_rising("left_out", first, listed);
      check_apart("scores", scores, {&first, &listed});
      check_apart("items", items, {&first, &listed});
      firsts = first.data();
      out = listed.data();
    }
    const py::gil_scoped_release release;
    karma::top_k(*packed_, rows_, queries.data(), firsts, out, best, threads);
  }

  const karma::Packed& packed() const { return *packed_; }

 private:
  py::array array_;
  Rows rows_;
  std::unique_ptr<karma::Packed> packed_;
};

void count_listed(const py::array& rows, const std::string& storage, double longest, const Array<float>& queries,
                  const Array<int64_t>& first, const Array<int64_t>& item, const Array<float>& score,
                  const Array<int64_t>& first_listed, const Array<int64_t>& listed, Array<int64_t> greater,
                  Array<int64_t> equal, int threads) {
  const Rows items = rows_of(rows, storage);
  check_aligned({&queries, &first, &item, &score, &first_listed, &listed, &greater, &equal});
  check_queries(queries, items.width);
  check_lists("targets", first, queries.shape(0), item.size());
  check_lists("listed", first_listed, queries.shape(0), listed.size());
  check_inside("listed", listed, 0, items.count);
  check_inside("item", item, -1, items.count);
  check_apart("greater", greater, {&rows, &first_listed, &listed});
  check_apart("equal", equal, {&rows, &first_listed, &listed});
  check_size("score", score, item.size());
  check_size("greater", greater, item.size());
  check_size("equal", equal, item.size());
  check_scores(score);
  check_apart("greater", greater, {&queries, &first, &item, &score, &equal});
  check_apart("equal", equal, {&queries, &first, &item, &score});
  const karma::Targets targets{queries.shape(0), queries.data(), first.data(), item.data(), score.data()};
  int64_t *above = greater.mutable_data(), *level = equal.mutable_data();
  const py::gil_scoped_release release;
  karma::count_listed(basics(), items, longest, targets, first_listed.data(), listed.data(), above, level, threads);
}

// Each list sorted, without repeats, and without the query's own targets.
std::pair<Array<int64_t>, Array<int64_t>> left_out(const Array<int64_t>& first_seen, const Array<int64_t>& seen,
                                                   const Array<int64_t>& first, const Array<int64_t>& item,
                                                   int64_t num_items) {
  const int64_t queries = first.size() - 1;
  check_aligned({&first_seen, &seen, &first, &item});
  check_lists("targets", first, queries, item.size());
  check_lists("seen", first_seen, queries, seen.size());
  check_inside("seen", seen, 0, num_items);
  Array<int64_t> starts(queries + 1);
  std::vector<int64_t> kept, one, own;
  kept.reserve(size_t(seen.size()));
  int64_t* start = starts.mutable_data();
  start[0] = 0;
  const int64_t *lists = first_seen.data(), *items = seen.data(), *owns = first.data(), *targets = item.data();
  {
    const py::gil_scoped_release release;
    for (int64_t q = 0; q < queries; ++q) {
      one.assign(items + lists[q], items + lists[q + 1]);
      std::sort(one.begin(), one.end());
      one.erase(std::unique(one.begin(), one.end()), one.end());
      own.assign(targets + owns[q], targets + owns[q + 1]);
      std::sort(own.begin(), own.end());
      std::set_difference(one.begin(), one.end(), own.begin(), own.end(), std::back_inserter(kept));
      start[q + 1] = int64_t(kept.size());
    }
  }
  return {starts, Array<int64_t>(py::ssize_t(kept.size()), kept.data())};
}

Array<float> pair_scores(const Array<float>& queries, const py::array& rows, const std::string& storage,
                         const Array<int64_t>& query, const Array<int64_t>& item, int threads) {
  const Rows items = rows_of(rows, storage);
  check_aligned({&queries, &query, &item});
  check_queries(queries, items.width);
  check_size("item", item, query.size());
  check_inside("query", query, 0, queries.shape(0));
  check_inside("item", item, 0, items.count);
  Array<float> out(query.size());
  float* to = out.mutable_data();
  const py::gil_scoped_release release;
  karma::pair_scores(basics(), queries.data(), items, query.size(), query.data(), item.data(), to, threads);
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Counting ranks and the k best items on CPUs.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const karma::NotFinite& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });
  m.def(
      "paths",
      [] {
        std::vector<std::pair<std::string, std::string>> out;
        for (const karma::Kernel* k : karma::kernels())
          out.emplace_back(k->name, k->exact                                     ? "exact"
                                    : k->precision == karma::Precision::int8     ? "int8"
                                    : k->precision == karma::Precision::bfloat16 ? "bfloat16"
                                                                                 : "float32");
        return out;
      },
      "(name, what it computes in) of every kernel that this machine can run.");
  m.def(
      "item_bytes",
      [](const std::string& path, int64_t width) {
        return karma::panel_units_of(kernel_named(path), width) * 4 / karma::kPanel;
      },
      py::arg("path"), py::arg("width"), "Bytes of an item of this width as a path packs it.");
  py::class_<Items>(m, "Items")
      .def(py::init<py::array, const std::string&, const std::string&, int64_t, int64_t, int>(), py::arg("rows"),
           py::arg("storage"), py::arg("path"), py::arg("begin"), py::arg("end"), py::arg("threads"))
      .def_property_readonly("begin", [](const Items& x) { return x.packed().begin; })
      .def_property_readonly("end", [](const Items& x) { return x.packed().end; })
      .def_property_readonly("block_items", [](const Items& x) { return x.packed().block_items(); })
      .def_property_readonly("nbytes", [](const Items& x) { return x.packed().bytes(); })
      .def_property_readonly("longest", [](const Items& x) { return x.packed().most().full; })
      .def("count", &Items::count, py::arg("queries").noconvert(), py::arg("first").noconvert(),
           py::arg("item").noconvert(), py::arg("score").noconvert(), py::arg("begin"), py::arg("end"),
           py::arg("greater").noconvert(), py::arg("equal").noconvert(), py::arg("threads"))
      .def("top_k", &Items::top_k, py::arg("queries").noconvert(), py::arg("left_out").noconvert(),
           py::arg("scores").noconvert(), py::arg("items").noconvert(), py::arg("threads"));
  m.def("count_listed", &count_listed, py::arg("rows"), py::arg("storage"), py::arg("longest"),
        py::arg("queries").noconvert(), py::arg("first").noconvert(), py::arg("item").noconvert(),
        py::arg("score").noconvert(), py::arg("first_listed").noconvert(), py::arg("listed").noconvert(),
        py::arg("greater").noconvert(), py::arg("equal").noconvert(), py::arg("threads"));
  m.def("left_out", &left_out, py::arg("first_seen").noconvert(), py::arg("seen").noconvert(),
        py::arg("first").noconvert(), py::arg("item").noconvert(), py::arg("num_items"));
  m.def("pair_scores", &pair_scores, py::arg("queries").noconvert(), py::arg("rows"), py::arg("storage"),
        py::arg("query").noconvert(), py::arg("item").noconvert(), py::arg("threads"));
}
