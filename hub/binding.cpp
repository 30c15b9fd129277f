// The module of a Hugging Face kernel, for every Python from 3.9 on: importing it registers the operators, in the
// namespace of its own name. The rest of the package's module _C stays out.
#define Py_LIMITED_API 0x03090000
#include <Python.h>

#include <stdexcept>
#include <string>

namespace flash_xlstm {

// torch has no way to pass on a TypeError of C++.
[[noreturn]] void throw_value_error(const std::string& message) { throw std::invalid_argument(message); }
[[noreturn]] void throw_type_error(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace flash_xlstm

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define INIT_OF(name) PyInit_##name
#define INIT(name) INIT_OF(name)

PyMODINIT_FUNC INIT(FLASH_XLSTM_KERNEL)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, TEXT(FLASH_XLSTM_KERNEL), nullptr, -1, nullptr,
                               nullptr,               nullptr,                  nullptr, nullptr};
  return PyModule_Create(&module);
}
