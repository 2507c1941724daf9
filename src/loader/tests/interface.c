/* A plugin that tries every function the server exports, in the places where each may be called. What is not as
 * expected is reported with its line.
 */

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

/* Newer than the distribution's headers. */
extern int nbdkit_parse_probability (const char *what, const char *str, double *r);
extern int nbdkit_parse_delay (const char *what, const char *str, unsigned *sec, unsigned *nsec);
extern void nbdkit_debug_hexdump (const void *buf, size_t len, const char *prefix, uint64_t start);
extern void nbdkit_disconnect (int force);
extern char *nbdkit_peer_security_context (void);
extern char *nbdkit_peer_tls_dn (void);
extern char *nbdkit_peer_tls_issuer_dn (void);

#define CHECK(what)                                                     \
  do {                                                                  \
    if (!(what)) {                                                      \
      nbdkit_error ("line %d: %s", __LINE__, #what);                    \
      return -1;                                                        \
    }                                                                   \
  } while (0)

static int
check_numbers (void)
{
  int i;
  unsigned u, sec, nsec;
  int8_t i8;
  uint8_t u8;
  int16_t i16;
  uint16_t u16;
  int32_t i32;
  uint32_t u32;
  int64_t i64;
  uint64_t u64;
  double d;

  CHECK (nbdkit_parse_size ("10k") == 10240 && nbdkit_parse_size ("2s") == 1024);
  CHECK (nbdkit_parse_size ("7E") == INT64_C (7) << 60);
  CHECK (nbdkit_parse_size ("8E") == -1 && nbdkit_parse_size ("-1") == -1 && nbdkit_parse_size ("") == -1);
  CHECK (nbdkit_parse_bool ("YES") == 1 && nbdkit_parse_bool ("off") == 0 && nbdkit_parse_bool ("x") == -1);
  CHECK (nbdkit_parse_int ("n", "-0x10", &i) == 0 && i == -16);
  CHECK (nbdkit_parse_unsigned ("n", "4294967295", &u) == 0 && u == UINT32_MAX);
  CHECK (nbdkit_parse_int8_t ("n", "-128", &i8) == 0 && i8 == -128);
  CHECK (nbdkit_parse_int8_t ("n", "128", &i8) == -1);
  CHECK (nbdkit_parse_uint8_t ("n", "0377", &u8) == 0 && u8 == 255);
  CHECK (nbdkit_parse_int16_t ("n", "32767", &i16) == 0 && i16 == 32767);
  CHECK (nbdkit_parse_uint16_t ("n", "65535", &u16) == 0 && u16 == 65535);
  CHECK (nbdkit_parse_int32_t ("n", "-2147483648", &i32) == 0 && i32 == INT32_MIN);
  CHECK (nbdkit_parse_uint32_t ("n", "-1", &u32) == -1);
  CHECK (nbdkit_parse_int64_t ("n", "-9223372036854775808", &i64) == 0 && i64 == INT64_MIN);
  CHECK (nbdkit_parse_uint64_t ("n", "18446744073709551615", &u64) == 0 && u64 == UINT64_MAX);
  CHECK (nbdkit_parse_uint64_t ("n", "7", NULL) == 0);
  CHECK (nbdkit_parse_probability ("p", "1:4", &d) == 0 && d == 0.25);
  CHECK (nbdkit_parse_probability ("p", "2", &d) == -1);
  CHECK (nbdkit_parse_delay ("d", "1500ms", &sec, &nsec) == 0 && sec == 1 && nsec == 500000000);
  CHECK (nbdkit_parse_delay ("d", "x", &sec, &nsec) == -1);
  return 0;
}

static int
check_strings (void)
{
  const char *one, *two;
  char *path, *password;

  one = nbdkit_strdup_intern ("one");
  two = nbdkit_strndup_intern ("two and more", 3);
  CHECK (one && strcmp (one, "one") == 0 && two && strcmp (two, "two") == 0);
  errno = ENOSPC;
  CHECK (strcmp (nbdkit_printf_intern ("%d %s %m", 7, "x"), "7 x No space left on device") == 0);
  CHECK (nbdkit_strdup_intern (NULL) == NULL && errno == EINVAL);
  path = nbdkit_absolute_path ("here");
  CHECK (path && path[0] == '/' && strcmp (path + strlen (path) - 5, "/here") == 0);
  free (path);
  path = nbdkit_absolute_path ("/there");
  CHECK (path && strcmp (path, "/there") == 0);
  free (path);
  path = nbdkit_realpath ("/usr/../usr/.");
  CHECK (path && strcmp (path, "/usr") == 0);
  free (path);
  CHECK (nbdkit_realpath ("/no/such/file") == NULL && errno == ENOENT);
  CHECK (nbdkit_read_password ("plain", &password) == 0 && strcmp (password, "plain") == 0);
  free (password);
  CHECK (nbdkit_read_password ("-1", &password) == -1 && password == NULL);
  return 0;
}

static int
test_config_complete (void)
{
  CHECK (check_numbers () == 0);
  CHECK (check_strings () == 0);
  errno = ENOENT;
  nbdkit_debug ("a message: %m");
  CHECK (errno == ENOENT);
  nbdkit_debug_hexdump ("0123456789abcdefXYZ", 19, "prefix ", 3);
  /* There is no connection yet. */
  CHECK (nbdkit_export_name () == NULL);
  CHECK (nbdkit_peer_pid () == -1);
  CHECK (nbdkit_nanosleep (0, 1) == 0);
  nbdkit_disconnect (1);
  return 0;
}

static void *
test_open (int readonly)
{
  return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t test_get_size (void *handle) { return 65536; }

static int
check_connection (void)
{
  struct sockaddr_storage address;
  socklen_t length = sizeof address;
  struct sockaddr_un *un = (struct sockaddr_un *) &address;

  CHECK (strcmp (nbdkit_export_name (), "name") == 0);
  CHECK (nbdkit_is_tls () == 0);
  CHECK (nbdkit_peer_pid () == 11 && nbdkit_peer_uid () == 12 && nbdkit_peer_gid () == 13);
  CHECK (nbdkit_peer_name ((struct sockaddr *) &address, &length) == 0);
  CHECK (length == sizeof (sa_family_t) && un->sun_family == AF_UNIX);
  CHECK (nbdkit_peer_security_context () == NULL);
  char *subject = nbdkit_peer_tls_dn (), *issuer = nbdkit_peer_tls_issuer_dn ();
  CHECK (subject && *subject == 0 && issuer && *issuer == 0);
  free (subject);
  free (issuer);
  return 0;
}

static int
test_pread (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  int r;

  memset (buf, 0, count);
  switch (offset) {
  case 0:
    return check_connection ();
  case 512:
    /* The client goes away meanwhile. */
    r = nbdkit_nanosleep (3600, 0);
    CHECK (r == -1 && errno == ESHUTDOWN);
    nbdkit_set_error (ESHUTDOWN);
    return -1;
  case 1024:
    nbdkit_shutdown ();
    return 0;
  case 1536:
    nbdkit_disconnect (0);
    return 0;
  case 2048:
    nbdkit_disconnect (1);
    return 0;
  }
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "interface",
  .config_complete = test_config_complete,
  .open = test_open,
  .get_size = test_get_size,
  .pread = test_pread,
};

NBDKIT_REGISTER_PLUGIN (plugin)
