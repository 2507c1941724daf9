/* What OCaml code asks of the server. Functions that nbdkit 1.32 does not have are looked up when they are called. */

#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#define CAML_NAME_SPACE
#include <caml/alloc.h>
#include <caml/bigarray.h>
#include <caml/fail.h>
#include <caml/memory.h>
#include <caml/mlvalues.h>

#include <nbdkit-plugin.h>
#include <nbdkit-version.h>

#include "plugin.h"
#include "runtime.h"

/* The constructors of Unix.error in their order. The last, EUNKNOWNERR, holds a number. */
static const int unix_errors[] = {
  E2BIG, EACCES, EAGAIN, EBADF, EBUSY, ECHILD, EDEADLK, EDOM, EEXIST, EFAULT, EFBIG, EINTR, EINVAL, EIO, EISDIR, EMFILE,
  EMLINK, ENAMETOOLONG, ENFILE, ENODEV, ENOENT, ENOEXEC, ENOLCK, ENOMEM, ENOSPC, ENOSYS, ENOTDIR, ENOTEMPTY, ENOTTY,
  ENXIO, EPERM, EPIPE, ERANGE, EROFS, ESPIPE, ESRCH, EXDEV, EWOULDBLOCK, EINPROGRESS, EALREADY, ENOTSOCK, EDESTADDRREQ,
  EMSGSIZE, EPROTOTYPE, ENOPROTOOPT, EPROTONOSUPPORT, ESOCKTNOSUPPORT, EOPNOTSUPP, EPFNOSUPPORT, EAFNOSUPPORT,
  EADDRINUSE, EADDRNOTAVAIL, ENETDOWN, ENETUNREACH, ENETRESET, ECONNABORTED, ECONNRESET, ENOBUFS, EISCONN, ENOTCONN,
  ESHUTDOWN, ETOOMANYREFS, ETIMEDOUT, ECONNREFUSED, EHOSTDOWN, EHOSTUNREACH, ELOOP, EOVERFLOW,
};

CAMLprim value
nbdkitocaml_set_error (value error)
{
  int number = EIO;

  if (Is_block (error))
    number = Int_val (Field (error, 0));
  else if (Long_val (error) >= 0 && (size_t) Long_val (error) < sizeof unix_errors / sizeof unix_errors[0])
    number = unix_errors[Long_val (error)];
  callback_errno = number;
  nbdkit_set_error (number);
  return Val_unit;
}

CAMLprim value
nbdkitocaml_blit_to (value buf, value string)
{
  size_t count = Caml_ba_array_val (buf)->dim[0];

  if (caml_string_length (string) < count)
    caml_invalid_argument ("NBDKit.blit_to: the string is shorter than the buffer");
  memcpy (Caml_ba_data_val (buf), String_val (string), count);
  return Val_unit;
}

CAMLprim value
nbdkitocaml_to_string (value buf)
{
  CAMLparam1 (buf);

  CAMLreturn (caml_alloc_initialized_string (Caml_ba_array_val (buf)->dim[0], Caml_ba_data_val (buf)));
}

/* The caller has checked the ranges. */
CAMLprim value
nbdkitocaml_copy_in (value bytes, value from, value buf, value at, value length)
{
  memcpy ((char *) Caml_ba_data_val (buf) + Long_val (at), (const char *) String_val (bytes) + Long_val (from),
          Long_val (length));
  return Val_unit;
}

CAMLprim value
nbdkitocaml_copy_out (value buf, value from, value bytes, value at, value length)
{
  memcpy ((char *) Bytes_val (bytes) + Long_val (at), (const char *) Caml_ba_data_val (buf) + Long_val (from),
          Long_val (length));
  return Val_unit;
}

/* A function of newer servers. */
static void *
newer (const char *name)
{
  void *function = dlsym (RTLD_DEFAULT, name);

  if (function == NULL)
    caml_failwith ("this server is too old for the function that the plugin called");
  return function;
}

CAMLprim value
nbdkitocaml_parse_size (value text)
{
  CAMLparam1 (text);
  int64_t size = nbdkit_parse_size (String_val (text));

  if (size == -1)
    caml_invalid_argument ("NBDKit.parse_size");
  CAMLreturn (caml_copy_int64 (size));
}

CAMLprim value
nbdkitocaml_parse_bool (value text)
{
  int answer = nbdkit_parse_bool (String_val (text));

  if (answer == -1)
    caml_invalid_argument ("NBDKit.parse_bool");
  return Val_bool (answer);
}

CAMLprim value
nbdkitocaml_parse_probability (value what, value text)
{
  CAMLparam2 (what, text);
  int (*parse) (const char *, const char *, double *) = newer ("nbdkit_parse_probability");
  double result;

  if (parse (String_val (what), String_val (text), &result) == -1)
    caml_invalid_argument ("NBDKit.parse_probability");
  CAMLreturn (caml_copy_double (result));
}

CAMLprim value
nbdkitocaml_parse_delay (value what, value text)
{
  CAMLparam2 (what, text);
  CAMLlocal1 (pair);
  int (*parse) (const char *, const char *, unsigned *, unsigned *) = newer ("nbdkit_parse_delay");
  unsigned seconds, nanoseconds;

  if (parse (String_val (what), String_val (text), &seconds, &nanoseconds) == -1)
    caml_invalid_argument ("NBDKit.parse_delay");
  pair = caml_alloc_tuple (2);
  Store_field (pair, 0, Val_long (seconds));
  Store_field (pair, 1, Val_long (nanoseconds));
  CAMLreturn (pair);
}

/* Takes over a string from malloc; NULL is the failure of the function. */
static value
taken (char *text, const char *function)
{
  CAMLparam0 ();
  CAMLlocal1 (copy);

  if (text == NULL)
    caml_invalid_argument (function);
  copy = caml_copy_string (text);
  free (text);
  CAMLreturn (copy);
}

CAMLprim value
nbdkitocaml_read_password (value from)
{
  CAMLparam1 (from);
  char *where = caml_stat_strdup (String_val (from));
  char *password = NULL;

  /* Somebody may have to type it. */
  begin_blocking ();
  if (nbdkit_read_password (where, &password) == -1)
    password = NULL;
  end_blocking ();
  caml_stat_free (where);
  CAMLreturn (taken (password, "NBDKit.read_password"));
}

CAMLprim value
nbdkitocaml_realpath (value path)
{
  CAMLparam1 (path);

  CAMLreturn (taken (nbdkit_realpath (String_val (path)), "NBDKit.realpath"));
}

CAMLprim value
nbdkitocaml_absolute_path (value path)
{
  CAMLparam1 (path);

  CAMLreturn (taken (nbdkit_absolute_path (String_val (path)), "NBDKit.absolute_path"));
}

CAMLprim value
nbdkitocaml_stdio_safe (value unit)
{
  (void) unit;
  return Val_bool (nbdkit_stdio_safe ());
}

CAMLprim value
nbdkitocaml_nanosleep (value seconds, value nanoseconds)
{
  CAMLparam2 (seconds, nanoseconds);
  long sec = Long_val (seconds), nsec = Long_val (nanoseconds);
  int answer;

  if (sec < 0 || nsec < 0 || nsec >= 1000000000)
    caml_invalid_argument ("NBDKit.nanosleep");
  begin_blocking ();
  answer = nbdkit_nanosleep (sec, nsec);
  end_blocking ();
  if (answer == -1)
    caml_failwith ("NBDKit.nanosleep: the server ends or the client is gone");
  CAMLreturn (Val_unit);
}

CAMLprim value
nbdkitocaml_export_name (value unit)
{
  CAMLparam1 (unit);
  const char *name = nbdkit_export_name ();

  if (name == NULL)
    caml_invalid_argument ("NBDKit.export_name");
  CAMLreturn (caml_copy_string (name));
}

CAMLprim value
nbdkitocaml_is_tls (value unit)
{
  int answer = nbdkit_is_tls ();

  (void) unit;
  if (answer == -1)
    caml_invalid_argument ("NBDKit.is_tls");
  return Val_bool (answer);
}

#define PEER_NUMBER(name)                                       \
  CAMLprim value                                                \
  nbdkitocaml_ ## name (value unit)                             \
  {                                                             \
    CAMLparam1 (unit);                                          \
    int64_t number = nbdkit_ ## name ();                        \
                                                                \
    if (number == -1)                                           \
      caml_invalid_argument ("NBDKit." #name);                  \
    CAMLreturn (caml_copy_int64 (number));                      \
  }
PEER_NUMBER (peer_pid)
PEER_NUMBER (peer_uid)
PEER_NUMBER (peer_gid)

/* Unix.sockaddr: ADDR_UNIX of string or ADDR_INET of inet_addr * int, where inet_addr is a string of the address's bytes.
 * It is made here, since not every plugin is linked with the library unix.
 */
enum { ADDR_UNIX, ADDR_INET };

static value
inet (const void *address, size_t length, in_port_t port)
{
  CAMLparam0 ();
  CAMLlocal2 (bytes, name);

  bytes = caml_alloc_initialized_string (length, address);
  name = caml_alloc (2, ADDR_INET);
  Store_field (name, 0, bytes);
  Store_field (name, 1, Val_int (ntohs (port)));
  CAMLreturn (name);
}

CAMLprim value
nbdkitocaml_peer_name (value unit)
{
  CAMLparam1 (unit);
  CAMLlocal2 (path, name);
  union {
    struct sockaddr any;
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
    struct sockaddr_un un;
    struct sockaddr_storage storage;
  } address;
  socklen_t length = sizeof address;
  const size_t start = offsetof (struct sockaddr_un, sun_path);

  if (nbdkit_peer_name (&address.any, &length) == -1)
    caml_invalid_argument ("NBDKit.peer_name");
  switch (address.any.sa_family) {
  case AF_INET:
    CAMLreturn (inet (&address.in.sin_addr, sizeof address.in.sin_addr, address.in.sin_port));
  case AF_INET6:
    CAMLreturn (inet (&address.in6.sin6_addr, sizeof address.in6.sin6_addr, address.in6.sin6_port));
  case AF_UNIX:
    /* A name in the file system ends with a zero byte, which the length may count. */
    length = length > start ? length - start : 0;
    if (length > 0 && address.un.sun_path[0])
      length = strnlen (address.un.sun_path, length);
    path = caml_alloc_initialized_string (length, address.un.sun_path);
    name = caml_alloc (1, ADDR_UNIX);
    Store_field (name, 0, path);
    CAMLreturn (name);
  default:
    caml_invalid_argument ("NBDKit.peer_name: it has another kind of address");
  }
}

#define PEER_TEXT(name)                                         \
  CAMLprim value                                                \
  nbdkitocaml_ ## name (value unit)                             \
  {                                                             \
    CAMLparam1 (unit);                                          \
    char *(*function) (void) = newer ("nbdkit_" #name);         \
                                                                \
    CAMLreturn (taken (function (), "NBDKit." #name));          \
  }
PEER_TEXT (peer_security_context)
PEER_TEXT (peer_tls_dn)
PEER_TEXT (peer_tls_issuer_dn)

CAMLprim value
nbdkitocaml_shutdown (value unit)
{
  nbdkit_shutdown ();
  return unit;
}

CAMLprim value
nbdkitocaml_disconnect (value force)
{
  void (*function) (int) = newer ("nbdkit_disconnect");

  function (Bool_val (force));
  return Val_unit;
}

CAMLprim value
nbdkitocaml_debug (value text)
{
  nbdkit_debug ("%s", String_val (text));
  return Val_unit;
}

CAMLprim value
nbdkitocaml_version (value unit)
{
  CAMLparam1 (unit);

  CAMLreturn (caml_copy_string (NBDKIT_VERSION_STRING));
}

CAMLprim value
nbdkitocaml_api_version (value unit)
{
  (void) unit;
  return Val_int (NBDKIT_API_VERSION);
}
