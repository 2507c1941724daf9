// A disk in memory, in C++: errors are exceptions inside, and are turned into errno at the interface.
//
//   g++ -shared -fPIC ramdisk.cpp -o ramdisk-cpp.so
//   nbdkit ./ramdisk-cpp.so size=64M

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

namespace {

class Disk {
public:
  explicit Disk (uint64_t size) : bytes (size) {}

  int64_t size () const { return static_cast<int64_t> (bytes.size ()); }

  void read (unsigned char *to, uint32_t count, uint64_t offset)
  {
    std::lock_guard<std::mutex> guard (lock);
    std::copy_n (at (offset), count, to);
  }

  void write (const unsigned char *from, uint32_t count, uint64_t offset)
  {
    std::lock_guard<std::mutex> guard (lock);
    std::copy_n (from, count, at (offset));
  }

private:
  std::vector<unsigned char>::iterator at (uint64_t offset)
  {
    return bytes.begin () + static_cast<std::ptrdiff_t> (offset);
  }

  std::mutex lock;
  std::vector<unsigned char> bytes;
};

int64_t size = 1024 * 1024;
std::unique_ptr<Disk> disk;

// No exception may leave the plugin.
template <typename Body>
int
guarded (Body body)
{
  try {
    body ();
    return 0;
  } catch (const std::bad_alloc &) {
    nbdkit_error ("no memory");
    nbdkit_set_error (ENOMEM);
  } catch (const std::exception &e) {
    nbdkit_error ("%s", e.what ());
    nbdkit_set_error (EIO);
  }
  return -1;
}

int
config (const char *key, const char *value)
{
  if (std::strcmp (key, "size") != 0) {
    nbdkit_error ("unknown parameter '%s'", key);
    return -1;
  }
  size = nbdkit_parse_size (value);
  return size == -1 ? -1 : 0;
}

int
get_ready ()
{
  return guarded ([] { disk.reset (new Disk (static_cast<uint64_t> (size))); });
}

void
cleanup ()
{
  disk.reset ();
}

void *
open (int)
{
  return disk.get ();
}

int64_t
get_size (void *handle)
{
  return static_cast<Disk *> (handle)->size ();
}

int
pread (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t)
{
  return guarded ([=] {
    static_cast<Disk *> (handle)->read (static_cast<unsigned char *> (buf), count, offset);
  });
}

int
pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t)
{
  return guarded ([=] {
    static_cast<Disk *> (handle)->write (static_cast<const unsigned char *> (buf), count, offset);
  });
}

int
flush (void *, uint32_t)
{
  return 0;
}

nbdkit_plugin
describe ()
{
  nbdkit_plugin plugin = {};

  plugin.name = "ramdisk-cpp";
  plugin.longname = "A disk in memory";
  plugin.config = config;
  plugin.config_help = "size=SIZE  The size of the disk, 1M by default.";
  plugin.magic_config_key = "size";
  plugin.get_ready = get_ready;
  plugin.cleanup = cleanup;
  plugin.open = open;
  plugin.get_size = get_size;
  plugin.pread = pread;
  plugin.pwrite = pwrite;
  plugin.flush = flush;
  return plugin;
}

nbdkit_plugin plugin = describe ();

} // namespace

NBDKIT_REGISTER_PLUGIN (plugin)
