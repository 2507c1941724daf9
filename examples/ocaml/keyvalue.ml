(* A disk in a key-value store: the keys are block numbers, and only blocks that hold something are kept. The store is a
   file that grows at its end, one record for each write: the key, then the value. Who starts reads it through and knows
   where the newest value of each key is; a record that was cut short is dropped.

   ocamlopt.opt unix.cmxa -output-obj -runtime-variant _pic \
      -o nbdkit-keyvalue-plugin.so NBDKit.cmx keyvalue.ml -cclib -lnbdkitocaml
   nbdkit ./nbdkit-keyvalue-plugin.so disk.store size=1G *)
let block = 4096
let record = 8 + block
let path = ref ""
let size = ref 0

(* Where the value of a key is in the file. *)
let index : (int, int) Hashtbl.t = Hashtbl.create 1024
let channels = ref None

let store () = match !channels with Some channels -> channels | None -> failwith "the store is not open"

let config key value =
  match key with
  | "store" -> path := NBDKit.absolute_path value
  | "size" -> size := Int64.to_int (NBDKit.parse_size value)
  | _ -> failwith ("unknown parameter " ^ key)

let config_complete () =
  if !path = "" then failwith "store= is missing: name the file";
  if !size <= 0 || !size mod block <> 0 then failwith "size= must be a multiple of 4096"

let get_ready () =
  let descriptor = Unix.openfile !path [ Unix.O_RDWR; Unix.O_CREAT; Unix.O_CLOEXEC ] 0o644 in
  let length = (Unix.fstat descriptor).Unix.st_size / record * record in
  Unix.ftruncate descriptor length;
  let input = Unix.in_channel_of_descr descriptor and output = Unix.out_channel_of_descr descriptor in
  let rec read at =
    if at < length then begin
      seek_in input at;
      let key = Bytes.create 8 in
      really_input input key 0 8;
      Hashtbl.replace index (Int64.to_int (Bytes.get_int64_le key 0)) (at + 8);
      read (at + record)
    end
  in
  read 0;
  seek_out output length;
  channels := Some (descriptor, input, output)

let get key =
  match Hashtbl.find_opt index key with
  | None -> Bytes.make block '\000'
  | Some at ->
      let _, input, output = store () in
      flush output;
      seek_in input at;
      let data = Bytes.create block in
      really_input input data 0 block;
      data

let put key data =
  let _, _, output = store () in
  flush output;
  let at = out_channel_length output in
  seek_out output at;
  let head = Bytes.create 8 in
  Bytes.set_int64_le head 0 (Int64.of_int key);
  output_bytes output head;
  output_bytes output data;
  Hashtbl.replace index key (at + 8)

(* Calls [visit key first_byte length done_before] for each block of the range. *)
let each offset count visit =
  let rec go offset before =
    if before < count then begin
      let start = offset mod block in
      let length = min (block - start) (count - before) in
      visit (offset / block) start length before;
      go (offset + length) (before + length)
    end
  in
  go (Int64.to_int offset) 0

let pread () buf offset _ =
  each offset (Bigarray.Array1.dim buf) (fun key start length before ->
      let data = get key in
      NBDKit.blit_to (Bigarray.Array1.sub buf before length) (Bytes.sub_string data start length))

let pwrite () buf offset _ =
  each offset (Bigarray.Array1.dim buf) (fun key start length before ->
      let data = if length = block then Bytes.create block else get key in
      Bytes.blit_string (NBDKit.to_string (Bigarray.Array1.sub buf before length)) 0 data start length;
      put key data)

let flush_store () _ =
  let descriptor, _, output = store () in
  flush output;
  Unix.fsync descriptor

let extents () count offset _ =
  let list = ref [] in
  let first = Int64.to_int offset / block * block in
  each (Int64.of_int first) (Int64.to_int count + Int64.to_int offset - first) (fun key _ _ _ ->
      let is_hole = not (Hashtbl.mem index key) in
      let offset = Int64.of_int (key * block) in
      list := { NBDKit.offset; length = Int64.of_int block; is_hole; is_zero = is_hole } :: !list);
  List.rev !list

let () =
  NBDKit.register_plugin
    {
      NBDKit.default_callbacks with
      name = "keyvalue";
      config_help = "store=FILE  (required) The store.\nsize=SIZE  (required) The size of the disk.";
      magic_config_key = "store";
      config = Some config;
      config_complete = Some config_complete;
      get_ready = Some get_ready;
      (* One file position for all. *)
      thread_model = Some (fun () -> NBDKit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS);
      open_connection = Some (fun _readonly -> ());
      get_size = Some (fun () -> Int64.of_int !size);
      block_size = Some (fun () -> (1, block, 0xffffffffL));
      can_multi_conn = Some (fun () -> true);
      pread = Some pread;
      pwrite = Some pwrite;
      flush = Some flush_store;
      extents = Some extents;
    }
