//! A plugin that fails in the way its export's name says.

use nbdkit::*;

struct Faults {
    export: String,
}

impl Drop for Faults {
    fn drop(&mut self) {
        debug!("dropped: {}", self.export);
        if self.export == "panic-in-drop" {
            panic!("the handle does not want to go");
        }
    }
}

impl Server for Faults {
    fn name() -> &'static str {
        "faults"
    }

    fn config(key: &str, value: &str) -> Result<()> {
        match key {
            "panic" => panic!("parameter {value}"),
            "error" => Err(Error::new(libc::EINVAL, format!("error={value}: as you wished"))),
            _ => Ok(()),
        }
    }

    fn open(_readonly: bool) -> Result<Box<dyn Server>> {
        let export = export_name().map_err(|error| Error::new(libc::EINVAL, error.to_string()))?;
        match export.as_str() {
            "panic-in-open" => panic!("no handle today"),
            "error-in-open" => Err(Error::new(libc::ENOENT, "there is no such disk")),
            _ => Ok(Box::new(Faults { export })),
        }
    }

    fn get_size(&self) -> Result<i64> {
        Ok(if self.export == "negative-size" { -5 } else { 1 << 20 })
    }

    fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        match self.export.as_str() {
            "enospc" => Err(Error::new(libc::ENOSPC, "the pool is full")),
            "system-call" => Err(std::io::Error::from_raw_os_error(libc::ENOMEM).into()),
            "no-errno" => Err(Error::new(0, "nobody knows why")),
            "errno-set-apart" => {
                set_error(libc::ESHUTDOWN);
                Err(Error::new(0, "see elsewhere"))
            }
            "zero-byte" => Err(Error::new(libc::EIO, "before\0after")),
            "panic" => panic!("a read of {} bytes", buf.len()),
            "panic-with-a-number" => std::panic::panic_any(7),
            _ => {
                buf.fill(b'f');
                Ok(())
            }
        }
    }

    fn write_at(&self, _buf: &[u8], _offset: u64, _flags: Flags) -> Result<()> {
        debug!("written instead");
        Ok(())
    }

    fn extents(
        &self,
        _count: u32,
        offset: u64,
        _flags: Flags,
        extent_handle: &mut ExtentHandle,
    ) -> Result<()> {
        extent_handle.add(offset, 512, ExtentType::Zero)?;
        extent_handle.add(offset + 1024, 512, ExtentType::Zero)
    }
}

// There is no zero.
plugin!(Faults { config, write_at, zero, extents });
