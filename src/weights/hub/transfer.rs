//! What is asked of a hub and how: descriptions and files over HTTP, with a limit on how long each answer may take.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::RepoInfo;
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::{Agent, Body};

/// A request that brought at least this much before it ended is continued by a next one; one that brought less failed.
/// Together with the time a request may take this is the slowest a hub may be.
const LEAST: u64 = 64 << 10;
/// A request for a file may take this many times the patience for an answer; then a next one continues it.
const SLICE: u32 = 3;
/// Redirects within a hub (a repository that was renamed).
const REDIRECTS: usize = 5;
/// How often, a second apart, the lock of a file that another process fetches is tried.
const LOCK_ATTEMPTS: u32 = 6;
/// Longest description of a repository.
const DESCRIPTION_BYTES: u64 = 64 << 20;

/// Why a request did not give what was asked for.
#[derive(Debug)]
pub(super) enum Trouble {
    /// Nobody answered, or not in time, or the connection broke off.
    Connection(String),
    /// The hub refused.
    Status(u16),
    /// The answer makes no sense.
    Answer(String),
    /// The cache cannot be written.
    Disk(io::Error),
    /// Another process holds the file's lock.
    Taken(PathBuf),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::Connection(what) | Trouble::Answer(what) => f.write_str(what),
            Trouble::Status(code) => write!(f, "the hub answered with the status {code}"),
            Trouble::Disk(error) => error.fmt(f),
            Trouble::Taken(path) => write!(f, "another process holds {}", path.display()),
        }
    }
}

impl From<ureq::Error> for Trouble {
    fn from(error: ureq::Error) -> Self {
        match error {
            ureq::Error::StatusCode(code) => Trouble::Status(code),
            error => Trouble::Connection(format!("no answer: {error}")),
        }
    }
}

/// A file as the hub describes it.
pub(super) struct Blob {
    /// What its contents are called: a digest, without quotes. Not checked.
    pub etag: String,
    /// Bytes.
    pub size: u64,
}

/// Asks a hub.
pub(super) struct Client {
    agent: Agent,
    /// Does not follow redirects: a hub says what a file is before it sends elsewhere for it.
    still: Agent,
    authorization: Option<String>,
}

impl Client {
    pub fn new(token: Option<&str>, patience: Duration) -> Self {
        let config = || {
            Agent::config_builder()
                .user_agent(format!("engraft/{}", env!("CARGO_PKG_VERSION")))
                // A range counts the bytes of the file, not those of a packed answer.
                .accept_encoding("identity")
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .timeout_resolve(Some(patience))
                .timeout_connect(Some(patience))
                .timeout_send_request(Some(patience))
                .timeout_recv_response(Some(patience))
                .timeout_recv_body(Some(patience * SLICE))
                .timeout_per_read(Some(patience))
        };
        Self {
            agent: config().build().into(),
            still: config().max_redirects(0).build().into(),
            authorization: token.map(|token| format!("Bearer {token}")),
        }
    }

    /// What is in a repository.
    pub fn description(&self, address: &str) -> Result<RepoInfo, Trouble> {
        let mut body = self.get(&self.agent, address, None)?.into_body();
        let mut bytes = Vec::new();
        let read = body.as_reader().take(DESCRIPTION_BYTES).read_to_end(&mut bytes);
        read.map_err(|error| Trouble::Connection(format!("the connection broke off: {error}")))?;
        serde_json::from_slice(&bytes).map_err(|error| {
            Trouble::Answer(format!("the hub's description of the repository makes no sense: {error}"))
        })
    }

    /// A small file whole, where it is there and at most `limit` bytes.
    pub fn text(&self, address: &str, limit: u64) -> Result<String, Trouble> {
        let mut body = self.get(&self.agent, address, None)?.into_body();
        let mut text = String::new();
        let read = body.as_reader().take(limit).read_to_string(&mut text);
        read.map_err(|error| Trouble::Connection(format!("the connection broke off: {error}")))?;
        Ok(text)
    }

    /// What a file is and how long.
    pub fn blob(&self, address: &str) -> Result<Blob, Trouble> {
        // One byte is asked for, because not every server answers a HEAD.
        let range = Some("bytes=0-0");
        let mut at = address.to_string();
        let mut answer = self.get(&self.still, &at, range)?;
        for _ in 0..REDIRECTS {
            let Some(path) = header(&answer, "location").filter(|to| to.starts_with('/') && !to.starts_with("//"))
            else {
                break;
            };
            let host = at.match_indices('/').nth(2).map_or(at.len(), |(slash, _)| slash);
            at.replace_range(host.., path);
            answer = self.get(&self.still, &at, range)?;
        }
        let missing = |what: &str| Trouble::Answer(format!("the hub's answer has no {what}"));
        let etag = header(&answer, "x-linked-etag").or_else(|| header(&answer, "etag"));
        let etag = etag.ok_or_else(|| missing("ETag"))?.trim_start_matches("W/").replace('"', "");
        if answer.status().is_redirection() {
            answer = self.get(&self.agent, &at, range)?;
        }
        let size = header(&answer, "content-range").and_then(|range| range.rsplit('/').next()?.parse().ok());
        Ok(Blob { etag, size: size.ok_or_else(|| missing("size of the file (Content-Range)"))? })
    }

    /// Fetches a file of `size` bytes to `stored`, continuing what an interrupted download left beside it.
    ///
    /// `progress` is called with the bytes that are here.
    pub fn download(
        &self,
        address: &str,
        stored: &Path,
        size: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Trouble> {
        if let Some(folder) = stored.parent() {
            fs::create_dir_all(folder).map_err(Trouble::Disk)?;
        }
        let beside = |ending: &str| {
            let mut path = stored.as_os_str().to_owned();
            path.push(ending);
            PathBuf::from(path)
        };
        let lock = File::create(beside(".lock")).map_err(Trouble::Disk)?;
        let mut left = LOCK_ATTEMPTS;
        while let Err(error) = lock.try_lock() {
            left -= 1;
            match error {
                TryLockError::WouldBlock if left > 0 => std::thread::sleep(Duration::from_secs(1)),
                TryLockError::WouldBlock => return Err(Trouble::Taken(beside(".lock"))),
                TryLockError::Error(error) => return Err(Trouble::Disk(error)),
            }
        }
        let part = beside(".part");
        let mut file = File::options().append(true).create(true).open(&part).map_err(Trouble::Disk)?;
        let mut done = file.metadata().map_err(Trouble::Disk)?.len();
        if done > size {
            file.set_len(0).map_err(Trouble::Disk)?;
            done = 0;
        }
        progress(done);
        while done < size {
            let before = done;
            let ended = self.slice(address, &mut file, &mut done, size, progress);
            match ended {
                Err(trouble @ Trouble::Connection(_)) if done - before < LEAST => return Err(trouble),
                Ok(()) | Err(Trouble::Connection(_)) if done > before => {}
                Ok(()) => return Err(Trouble::Connection("the hub sends nothing of the file".into())),
                Err(trouble) => return Err(trouble),
            }
        }
        file.sync_all().map_err(Trouble::Disk)?;
        fs::rename(&part, stored).map_err(Trouble::Disk)
    }

    /// One request for what is missing of a file.
    fn slice(
        &self,
        address: &str,
        file: &mut File,
        done: &mut u64,
        size: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Trouble> {
        let answer = self.get(&self.agent, address, Some(&format!("bytes={done}-")))?;
        // A server that ignores the range begins again at the first byte.
        if *done > 0 && answer.status().as_u16() != 206 {
            file.set_len(0).map_err(Trouble::Disk)?;
            *done = 0;
        }
        let mut body = answer.into_body();
        let mut reader = body.as_reader();
        let mut buffer = vec![0; 128 << 10];
        while *done < size {
            let room = buffer.len().min(usize::try_from(size - *done).unwrap_or(usize::MAX));
            let read = match reader.read(&mut buffer[..room]) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Trouble::Connection(format!("the connection broke off: {error}"))),
            };
            file.write_all(&buffer[..read]).map_err(Trouble::Disk)?;
            *done += read as u64;
            progress(*done);
        }
        Ok(())
    }

    fn get(&self, agent: &Agent, address: &str, range: Option<&str>) -> Result<Response<Body>, Trouble> {
        let mut request = agent.get(address);
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        if let Some(range) = range {
            request = request.header("Range", range);
        }
        Ok(request.call()?)
    }
}

fn header<'r>(answer: &'r Response<Body>, name: &str) -> Option<&'r str> {
    answer.headers().get(name)?.to_str().ok()
}

/// Links `path`, in a snapshot of the cache, to `stored` among its blobs: relative, so that the cache may be moved.
pub(super) fn link(stored: &Path, path: &Path) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new(""));
    fs::create_dir_all(folder)?;
    let shared = stored.ancestors().find(|above| path.starts_with(above)).unwrap_or(Path::new("/"));
    let (up, down) = (folder.strip_prefix(shared), stored.strip_prefix(shared));
    let target = match (up, down) {
        (Ok(up), Ok(down)) => up.components().map(|_| "..").collect::<PathBuf>().join(down),
        _ => stored.to_path_buf(),
    };
    // A link to nothing, which an interrupted run may have left, stands in the way.
    if path.symlink_metadata().is_ok() {
        fs::remove_file(path)?;
    }
    std::os::unix::fs::symlink(target, path)
}
