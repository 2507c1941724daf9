type flag = May_trim | FUA | Req_one | Fast_zero
type flags = flag list
type fua_flag = FuaNone | FuaEmulate | FuaNative
type cache_flag = CacheNone | CacheEmulate | CacheNop

type thread_model =
  | THREAD_MODEL_SERIALIZE_CONNECTIONS
  | THREAD_MODEL_SERIALIZE_ALL_REQUESTS
  | THREAD_MODEL_SERIALIZE_REQUESTS
  | THREAD_MODEL_PARALLEL

type extent = { offset : int64; length : int64; is_hole : bool; is_zero : bool }
type export = { name : string; description : string option }
type buf = (char, Bigarray.int8_unsigned_elt, Bigarray.c_layout) Bigarray.Array1.t

type 'a plugin = {
  name : string;
  longname : string;
  version : string;
  description : string;
  load : (unit -> unit) option;
  get_ready : (unit -> unit) option;
  after_fork : (unit -> unit) option;
  cleanup : (unit -> unit) option;
  unload : (unit -> unit) option;
  config : (string -> string -> unit) option;
  config_complete : (unit -> unit) option;
  config_help : string;
  thread_model : (unit -> thread_model) option;
  magic_config_key : string;
  preconnect : (bool -> unit) option;
  open_connection : (bool -> 'a) option;
  close : ('a -> unit) option;
  get_size : ('a -> int64) option;
  block_size : ('a -> int * int * int64) option;
  can_cache : ('a -> cache_flag) option;
  can_extents : ('a -> bool) option;
  can_fast_zero : ('a -> bool) option;
  can_flush : ('a -> bool) option;
  can_fua : ('a -> fua_flag) option;
  can_multi_conn : ('a -> bool) option;
  can_trim : ('a -> bool) option;
  can_write : ('a -> bool) option;
  can_zero : ('a -> bool) option;
  is_rotational : ('a -> bool) option;
  pread : ('a -> buf -> int64 -> flags -> unit) option;
  pwrite : ('a -> buf -> int64 -> flags -> unit) option;
  flush : ('a -> flags -> unit) option;
  trim : ('a -> int64 -> int64 -> flags -> unit) option;
  zero : ('a -> int64 -> int64 -> flags -> unit) option;
  extents : ('a -> int64 -> int64 -> flags -> extent list) option;
  cache : ('a -> int64 -> int64 -> flags -> unit) option;
  dump_plugin : (unit -> unit) option;
  list_exports : (bool -> bool -> export list) option;
  default_export : (bool -> bool -> string) option;
  export_description : ('a -> string) option;
}

let default_callbacks =
  {
    name = "";
    longname = "";
    version = "";
    description = "";
    load = None;
    get_ready = None;
    after_fork = None;
    cleanup = None;
    unload = None;
    config = None;
    config_complete = None;
    config_help = "";
    thread_model = None;
    magic_config_key = "";
    preconnect = None;
    open_connection = None;
    close = None;
    get_size = None;
    block_size = None;
    can_cache = None;
    can_extents = None;
    can_fast_zero = None;
    can_flush = None;
    can_fua = None;
    can_multi_conn = None;
    can_trim = None;
    can_write = None;
    can_zero = None;
    is_rotational = None;
    pread = None;
    pwrite = None;
    flush = None;
    trim = None;
    zero = None;
    extents = None;
    cache = None;
    dump_plugin = None;
    list_exports = None;
    default_export = None;
    export_description = None;
  }

(* The C part keeps texts and callbacks under the names that they have here. *)
external set_text : string -> string -> unit = "nbdkitocaml_set_text"
external set_callback : string -> 'a -> unit = "nbdkitocaml_set_callback"

(* An exception as the log shows it. *)
let describe = function
  | Failure text | Invalid_argument text | Sys_error text -> text
  | error -> Printexc.to_string error

let is_registered = ref false

let register_record plugin =
  if !is_registered then failwith "NBDKit.register_plugin was called twice";
  let required field is_missing = if is_missing then failwith ("NBDKit.register_plugin: " ^ field ^ " is required") in
  required "name" (plugin.name = "");
  required "open_connection" (plugin.open_connection = None);
  required "get_size" (plugin.get_size = None);
  required "pread" (plugin.pread = None);
  let text field value = if value <> "" then set_text field value in
  let callback field value = Option.iter (set_callback field) value in
  text "name" plugin.name;
  text "longname" plugin.longname;
  text "version" plugin.version;
  text "description" plugin.description;
  text "config_help" plugin.config_help;
  text "magic_config_key" plugin.magic_config_key;
  callback "load" plugin.load;
  callback "get_ready" plugin.get_ready;
  callback "after_fork" plugin.after_fork;
  callback "cleanup" plugin.cleanup;
  callback "unload" plugin.unload;
  callback "config" plugin.config;
  callback "config_complete" plugin.config_complete;
  callback "thread_model" plugin.thread_model;
  callback "preconnect" plugin.preconnect;
  callback "open_connection" plugin.open_connection;
  callback "close" plugin.close;
  callback "get_size" plugin.get_size;
  callback "block_size" plugin.block_size;
  callback "can_cache" plugin.can_cache;
  callback "can_extents" plugin.can_extents;
  callback "can_fast_zero" plugin.can_fast_zero;
  callback "can_flush" plugin.can_flush;
  callback "can_fua" plugin.can_fua;
  callback "can_multi_conn" plugin.can_multi_conn;
  callback "can_trim" plugin.can_trim;
  callback "can_write" plugin.can_write;
  callback "can_zero" plugin.can_zero;
  callback "is_rotational" plugin.is_rotational;
  callback "pread" plugin.pread;
  callback "pwrite" plugin.pwrite;
  callback "flush" plugin.flush;
  callback "trim" plugin.trim;
  callback "zero" plugin.zero;
  callback "extents" plugin.extents;
  callback "cache" plugin.cache;
  callback "dump_plugin" (Option.map (fun dump () -> dump (); flush stdout) plugin.dump_plugin);
  callback "list_exports" plugin.list_exports;
  callback "default_export" plugin.default_export;
  callback "export_description" plugin.export_description;
  callback "describe" (Some describe);
  is_registered := true

(* The two forms differ in their last argument, which is () or a record, and so a block of this shape. *)
let is_plugin last =
  let last = Obj.repr last and shape = Obj.repr default_callbacks in
  Obj.is_block last && Obj.tag last = Obj.tag shape && Obj.size last = Obj.size shape

let register_plugin
    ?(name = "") ?(longname = "") ?(version = "") ?(description = "") ?load ?get_ready ?after_fork ?cleanup ?unload
    ?config ?config_complete ?(config_help = "") ?thread_model ?(magic_config_key = "") ?preconnect ?open_connection
    ?close ?get_size ?block_size ?can_cache ?can_extents ?can_fast_zero ?can_flush ?can_fua ?can_multi_conn ?can_trim
    ?can_write ?can_zero ?is_rotational ?pread ?pwrite ?flush ?trim ?zero ?extents ?cache ?dump_plugin ?list_exports
    ?default_export ?export_description last =
  if is_plugin last then register_record (Obj.obj (Obj.repr last))
  else if Obj.is_int (Obj.repr last) then
    register_record
      {
        name; longname; version; description; load; get_ready; after_fork; cleanup; unload; config; config_complete;
        config_help; thread_model; magic_config_key; preconnect; open_connection; close; get_size; block_size;
        can_cache; can_extents; can_fast_zero; can_flush; can_fua; can_multi_conn; can_trim; can_write; can_zero;
        is_rotational; pread; pwrite; flush; trim; zero; extents; cache; dump_plugin; list_exports; default_export;
        export_description;
      }
  else failwith "NBDKit.register_plugin: the last argument must be () or a plugin"

external blit_to : buf -> string -> unit = "nbdkitocaml_blit_to"
external to_string : buf -> string = "nbdkitocaml_to_string"

let buf_len = Bigarray.Array1.dim

external copy_from_string : string -> int -> buf -> int -> int -> unit = "nbdkitocaml_copy_in"
external copy_from_bytes : bytes -> int -> buf -> int -> int -> unit = "nbdkitocaml_copy_in"
external copy_to_bytes : buf -> int -> bytes -> int -> int -> unit = "nbdkitocaml_copy_out"

(* No sum here can pass the largest integer. *)
let check_blit name source_length from target_length at length =
  let fits whole start = start >= 0 && start <= whole && length <= whole - start in
  if length < 0 || not (fits source_length from && fits target_length at) then invalid_arg ("NBDKit." ^ name)

let blit_string_to_buf source from target at length =
  check_blit "blit_string_to_buf" (String.length source) from (buf_len target) at length;
  copy_from_string source from target at length

let blit_bytes_to_buf source from target at length =
  check_blit "blit_bytes_to_buf" (Bytes.length source) from (buf_len target) at length;
  copy_from_bytes source from target at length

let blit_buf_to_bytes source from target at length =
  check_blit "blit_buf_to_bytes" (buf_len source) from (Bytes.length target) at length;
  copy_to_bytes source from target at length

let string_pread pread handle buf offset flags =
  let count = Bigarray.Array1.dim buf in
  let data = pread handle (Int32.of_int count) offset flags in
  if String.length data < count then
    Printf.ksprintf failwith "returned %d bytes where %d were asked for" (String.length data) count;
  blit_to buf data

let string_pwrite pwrite handle buf offset flags = pwrite handle (to_string buf) offset flags

external set_error : Unix.error -> unit = "nbdkitocaml_set_error"
external parse_size : string -> int64 = "nbdkitocaml_parse_size"
external parse_bool : string -> bool = "nbdkitocaml_parse_bool"
external parse_probability : string -> string -> float = "nbdkitocaml_parse_probability"
external parse_delay : string -> string -> int * int = "nbdkitocaml_parse_delay"
external read_password : string -> string = "nbdkitocaml_read_password"
external realpath : string -> string = "nbdkitocaml_realpath"
external absolute_path : string -> string = "nbdkitocaml_absolute_path"
external stdio_safe : unit -> bool = "nbdkitocaml_stdio_safe"
external nanosleep : int -> int -> unit = "nbdkitocaml_nanosleep"
external export_name : unit -> string = "nbdkitocaml_export_name"
external is_tls : unit -> bool = "nbdkitocaml_is_tls"
external peer_name : unit -> Unix.sockaddr = "nbdkitocaml_peer_name"
external peer_pid : unit -> int64 = "nbdkitocaml_peer_pid"
external peer_uid : unit -> int64 = "nbdkitocaml_peer_uid"
external peer_gid : unit -> int64 = "nbdkitocaml_peer_gid"
external peer_security_context : unit -> string = "nbdkitocaml_peer_security_context"
external peer_tls_dn : unit -> string = "nbdkitocaml_peer_tls_dn"
external peer_tls_issuer_dn : unit -> string = "nbdkitocaml_peer_tls_issuer_dn"
external shutdown : unit -> unit = "nbdkitocaml_shutdown"
external disconnect : bool -> unit = "nbdkitocaml_disconnect"
external debug_text : string -> unit = "nbdkitocaml_debug"

let debug format = Printf.ksprintf debug_text format

external version : unit -> string = "nbdkitocaml_version"
external api_version : unit -> int = "nbdkitocaml_api_version"
