(* A disk whose every callback makes the collector work: blocks are small strings that are remade all the time, handles
   hold fresh values, and the heap is compacted again and again. *)
type handle = { name : string; mutable history : string list; table : (int, string) Hashtbl.t }

let block = 512
let size = 2 lsl 20
let disk = Array.init (size / block) (fun _ -> String.make block '\000')
let calls = ref 0

let work h what =
  incr calls;
  h.history <- what :: (if List.length h.history > 20 then [] else h.history);
  Hashtbl.replace h.table (!calls land 255) (String.concat "/" h.history);
  if !calls mod 50 = 0 then Gc.compact () else if !calls mod 7 = 0 then Gc.minor ();
  if not (String.length h.name = 9 && String.sub h.name 0 7 = "handle-") then failwith "the handle is damaged"

let check offset count = if offset land (block - 1) <> 0 || count land (block - 1) <> 0 then failwith "not aligned"

let pread h buf offset flags =
  let offset = Int64.to_int offset and count = Bigarray.Array1.dim buf in
  check offset count;
  assert (flags = []);
  work h (Printf.sprintf "read %d %d" count offset);
  for i = 0 to (count / block) - 1 do
    let part = Bigarray.Array1.sub buf (i * block) block in
    NBDKit.blit_to part disk.((offset / block) + i)
  done

let pwrite h buf offset _ =
  let offset = Int64.to_int offset and count = Bigarray.Array1.dim buf in
  check offset count;
  work h (Printf.sprintf "write %d %d" count offset);
  let data = NBDKit.to_string buf in
  for i = 0 to (count / block) - 1 do
    disk.((offset / block) + i) <- String.sub data (i * block) block
  done

let extents h count offset flags =
  work h (Printf.sprintf "extents %Ld %Ld %d" count offset (List.length flags));
  List.init 64 (fun i ->
      { NBDKit.offset = Int64.of_int (i * size / 64); length = Int64.of_int (size / 64); is_hole = i land 1 = 0;
        is_zero = false })

let () =
  NBDKit.register_plugin
    {
      NBDKit.default_callbacks with
      name = "stress";
      open_connection =
        Some
          (fun _ ->
            let h = { name = Printf.sprintf "handle-%02d" (!calls mod 100); history = []; table = Hashtbl.create 1 } in
            work h "open";
            h);
      close = Some (fun h -> work h "close");
      get_size = Some (fun h -> work h "size"; Int64.of_int size);
      block_size = Some (fun _ -> (block, 4096, 0xffffffffL));
      can_multi_conn = Some (fun h -> work h "multi"; true);
      pread = Some pread;
      pwrite = Some pwrite;
      flush = Some (fun h _ -> work h "flush"; try failwith "caught" with Failure _ -> ());
      zero = Some (fun h _ _ flags -> work h "zero"; assert (List.length flags < 4); NBDKit.set_error Unix.EOPNOTSUPP; failwith (String.concat "," h.history));
      extents = Some extents;
      export_description = Some (fun h -> work h "description"; String.concat "," h.history);
      list_exports = Some (fun _ _ -> List.init 50 (fun i -> { NBDKit.name = string_of_int i; description = Some (String.make i 'd') }));
    }
