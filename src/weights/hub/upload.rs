//! A folder to a repository on a hub, as `huggingface_hub` sends it: the repository is made, the hub says which files are large,
//! those go by Git LFS (in parts where it asks for that), and one commit makes all of it visible at once.
//!
//! What the hub already has is not sent again: large files are known by their SHA-256, so an upload that was interrupted goes on
//! with the file it was at. Sources: the LFS batch API (github.com/git-lfs/git-lfs, docs/api/batch.md) and the hub's own API as
//! `huggingface_hub` 1.33 uses it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::{Value, json};
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::{Agent, Body, SendBody};

use super::super::sha256_file;
use super::{ATTEMPTS, Hub, check_name};
use crate::{Error, Fault, Result};

/// Bytes of a file's beginning that the hub decides by whether it is text.
const SAMPLE: u64 = 512;
/// Files asked about at once, the hub's limit.
const AT_ONCE: usize = 256;
/// Longest answer of the hub that is read.
const MOST_BYTES: u64 = 16 << 20;
/// Bytes a second below which an upload counts as stuck.
const SLOWEST: u64 = 32 << 10;

/// A repository to push to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Push<'a> {
    /// `user/name`.
    pub id: &'a str,
    /// Whether everybody may see it, where it is made now; one that is there keeps what it is.
    pub public: bool,
    /// The commit's message.
    pub message: &'a str,
}

/// What was pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// Where it can be looked at.
    pub address: String,
    /// The commit.
    pub commit: String,
    /// Bytes sent.
    pub sent: u64,
    /// Bytes that the hub already had.
    pub known: u64,
}

/// A file on its way.
struct Item {
    path: PathBuf,
    /// Its name in the repository.
    name: String,
    bytes: u64,
    /// Its SHA-256, where it goes by LFS.
    digest: Option<String>,
    ignored: bool,
}

impl Hub {
    /// Whose repository `id` is, what it is called, and the token to push with; nothing is sent.
    ///
    /// # Errors
    /// [`Error::Network`]: no token, a name that is none, a hub that is not to be asked.
    pub fn may_push<'a>(&'a self, id: &'a str) -> Result<(&'a str, &'a str, &'a str)> {
        check_name(id, "main")?;
        let Some((owner, name)) = id.split_once('/') else {
            let fault = Fault::new(format_args!("{:?}", id), "does not say whose repository it is");
            return Err(Error::Network(fault.hint("write user/name")));
        };
        let Some(token) = &self.token else {
            let fault = Fault::new(id, "a hub takes files only from those it knows, and there is no token");
            return Err(Error::Network(
                fault.hint("log in with `hf auth login`, or set HF_TOKEN to a token that may write"),
            ));
        };
        if self.offline {
            let fault = Fault::new("HF_HUB_OFFLINE is set", format_args!("so {} cannot be pushed to", id));
            return Err(Error::Network(fault.hint("unset it")));
        }
        Ok((owner, name, token))
    }

    /// Pushes the files of `folder` (those that lie in it, and none of its folders). `progress` is told bytes done and in all.
    ///
    /// # Errors
    /// [`Error::Network`]: no token, a name that is none, a hub that cannot be reached or refuses: each says the way out.
    pub fn push(&self, folder: &Path, push: Push<'_>, progress: &mut dyn FnMut(u64, u64)) -> Result<Pushed> {
        let (owner, name, token) = self.may_push(push.id)?;
        let remote = Remote::new(self, push.id, token);
        let mut items = items(folder)?;
        remote.create(owner, name, push.public)?;
        remote.sort(&mut items)?;
        items.retain(|item| !item.ignored);
        let all = items.iter().map(|item| item.bytes).sum();
        let (mut sent, mut known) = (0, 0);
        for item in items.iter().filter(|item| item.digest.is_some()) {
            let before = sent + known;
            progress(before, all);
            match remote.large(item, &mut |here| progress(before + here, all))? {
                true => sent += item.bytes,
                false => known += item.bytes,
            }
        }
        let commit = remote.commit(&items, push.message)?;
        sent += items.iter().filter(|item| item.digest.is_none()).map(|item| item.bytes).sum::<u64>();
        progress(all, all);
        Ok(Pushed { address: format!("{}/{}", self.endpoint, push.id), commit, sent, known })
    }
}

fn items(folder: &Path) -> Result<Vec<Item>> {
    let fault =
        |path: &Path, error: &std::io::Error| Error::Output(Fault::at(path, format_args!("cannot be read: {error}")));
    let entries = fs::read_dir(folder).map_err(|error| fault(folder, &error))?;
    let mut items = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| fault(folder, &error))?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let metadata = path.metadata().map_err(|error| fault(&path, &error))?;
        // What begins with a dot is a lock, or what a killed process left.
        if metadata.is_file() && !name.starts_with('.') {
            items.push(Item { path, name, bytes: metadata.len(), digest: None, ignored: false });
        }
    }
    if items.is_empty() {
        let fault = Fault::at(folder, "holds no file to push");
        return Err(Error::Output(fault.hint("name the folder that was exported")));
    }
    items.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(items)
}

/// A repository, and how it is spoken to.
struct Remote<'a> {
    hub: &'a Hub,
    id: &'a str,
    agent: Agent,
    authorization: String,
}

/// What went wrong with one request.
enum Trouble {
    Connection(String),
    Status(u16, String),
    Answer(String),
    Disk(std::io::Error),
}

impl Remote<'_> {
    fn new<'a>(hub: &'a Hub, id: &'a str, token: &str) -> Remote<'a> {
        let patience = hub.patience;
        let config = Agent::config_builder()
            .user_agent(format!("engraft/{}", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_resolve(Some(patience))
            .timeout_connect(Some(patience))
            .timeout_send_request(Some(patience))
            // The hub answers a part only once it has stored it.
            .timeout_recv_response(Some(patience * 6))
            .timeout_recv_body(Some(patience));
        Remote { hub, id, agent: config.build().into(), authorization: format!("Bearer {token}") }
    }

    fn address(&self, path: &str) -> String {
        format!("{}/api/models/{}/{path}", self.hub.endpoint, self.id)
    }

    /// Makes the repository, unless it is there.
    fn create(&self, owner: &str, name: &str, public: bool) -> Result<()> {
        let address = format!("{}/api/repos/create", self.hub.endpoint);
        let body = json!({"type": "model", "name": name, "organization": owner, "private": !public});
        match self.repeat(|| self.post(&address, "application/json", body.to_string().as_bytes())) {
            Ok(_) | Err(Trouble::Status(409, _)) => Ok(()),
            // A token that may write to a repository need not be one that may make it.
            Err(trouble @ Trouble::Status(401..=403, _)) => {
                match self.repeat(|| self.call(self.agent.get(self.address("revision/main")))) {
                    Ok(_) => Ok(()),
                    Err(_) => Err(self.failure("", &trouble)),
                }
            }
            Err(trouble) => Err(self.failure("", &trouble)),
        }
    }

    /// Finds out which files go by LFS, and their digests.
    fn sort(&self, items: &mut [Item]) -> Result<()> {
        for chunk in items.chunks_mut(AT_ONCE) {
            let mut files = Vec::new();
            for item in chunk.iter() {
                let mut sample = Vec::new();
                let read = File::open(&item.path).and_then(|file| file.take(SAMPLE).read_to_end(&mut sample));
                read.map_err(|error| self.failure(&item.name, &Trouble::Disk(error)))?;
                files.push(json!({"path": item.name, "sample": BASE64_STANDARD.encode(sample), "size": item.bytes}));
            }
            let body = json!({"files": files}).to_string();
            let address = self.address("preupload/main");
            let answer = self.repeat(|| self.post(&address, "application/json", body.as_bytes()));
            let answer = answer.map_err(|trouble| self.failure("", &trouble))?;
            let said: BTreeMap<&str, &Value> = answer["files"]
                .as_array()
                .map(Vec::as_slice)
                .unwrap_or_default()
                .iter()
                .filter_map(|file| Some((file["path"].as_str()?, file)))
                .collect();
            for item in chunk {
                let Some(file) = said.get(item.name.as_str()) else {
                    let trouble = Trouble::Answer("the hub does not say how it takes this file".into());
                    return Err(self.failure(&item.name, &trouble));
                };
                item.ignored = file["shouldIgnore"] == true;
                // An empty file cannot go by LFS, whatever its name says.
                if file["uploadMode"] == "lfs" && item.bytes > 0 {
                    item.digest = Some(sha256_file(&item.path)?);
                }
            }
        }
        Ok(())
    }

    /// Sends a large file; whether the hub did not have it.
    fn large(&self, item: &Item, progress: &mut dyn FnMut(u64)) -> Result<bool> {
        let digest = item.digest.as_deref().unwrap_or_default();
        let sent = self.repeat(|| {
            let actions = self.batch(digest, item.bytes)?;
            let upload = &actions["upload"];
            let Some(address) = upload["href"].as_str() else { return Ok(false) };
            match upload["header"]["chunk_size"]
                .as_str()
                .and_then(|size| size.parse::<u64>().ok())
                .filter(|size| *size > 0)
            {
                Some(size) => self.in_parts(item, digest, address, &upload["header"], size, progress)?,
                None => {
                    self.put(address, &upload["header"], item, 0, item.bytes)?;
                }
            }
            if let Some(address) = actions["verify"]["href"].as_str() {
                let body = json!({"oid": digest, "size": item.bytes}).to_string();
                self.post(address, LFS, body.as_bytes())?;
            }
            progress(item.bytes);
            Ok(true)
        });
        sent.map_err(|trouble| self.failure(&item.name, &trouble))
    }

    /// What the hub wants done about a large file: nothing where it has it.
    fn batch(&self, digest: &str, bytes: u64) -> Result<Value, Trouble> {
        let address = format!("{}/{}.git/info/lfs/objects/batch", self.hub.endpoint, self.id);
        let body = json!({
            "operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256",
            "ref": {"name": "main"}, "objects": [{"oid": digest, "size": bytes}],
        });
        let answer = self.post(&address, LFS, body.to_string().as_bytes())?;
        let object = answer["objects"].get(0).filter(|object| object["oid"] == digest);
        let object = object.ok_or_else(|| Trouble::Answer("the hub's answer does not name this file".into()))?;
        if let Some(message) = object["error"]["message"].as_str() {
            let code = object["error"]["code"].as_u64().and_then(|code| u16::try_from(code).ok());
            return Err(Trouble::Status(code.unwrap_or(400), message.to_string()));
        }
        Ok(object["actions"].clone())
    }

    /// Part by part; one that fails is sent again by itself.
    fn in_parts(
        &self,
        item: &Item,
        digest: &str,
        finish: &str,
        header: &Value,
        size: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Trouble> {
        let numbered = header.as_object().into_iter().flatten().filter_map(|(key, address)| {
            let digits = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_digit());
            Some((key.parse::<u64>().ok().filter(|_| digits)?, address.as_str()?))
        });
        let addresses: BTreeMap<u64, &str> = numbered.collect();
        if addresses.len() as u64 != item.bytes.div_ceil(size) {
            let what = format!("the hub gives {} parts of {size} bytes for {} bytes", addresses.len(), item.bytes);
            return Err(Trouble::Answer(what));
        }
        let mut parts = Vec::new();
        for (index, address) in addresses.values().enumerate() {
            let begin = index as u64 * size;
            let length = size.min(item.bytes - begin);
            let etag = self.repeat(|| self.put(address, &Value::Null, item, begin, length))?;
            let etag = etag.ok_or_else(|| Trouble::Answer(format!("part {} has no ETag", index + 1)))?;
            parts.push(json!({"partNumber": index + 1, "etag": etag}));
            progress(begin + length);
        }
        let body = json!({"oid": digest, "parts": parts}).to_string();
        self.post(finish, LFS, body.as_bytes()).map(drop)
    }

    /// Sends bytes of a file to where the hub wants them: its ETag there. The address itself says who may write to it.
    fn put(
        &self,
        address: &str,
        header: &Value,
        item: &Item,
        begin: u64,
        length: u64,
    ) -> Result<Option<String>, Trouble> {
        let mut file = File::open(&item.path).map_err(Trouble::Disk)?;
        file.seek(SeekFrom::Start(begin)).map_err(Trouble::Disk)?;
        let mut body = file.take(length);
        let patience = self.hub.patience + Duration::from_secs(length / SLOWEST);
        let mut request = self.agent.put(address).config().timeout_send_body(Some(patience)).build();
        for (name, value) in header.as_object().into_iter().flatten() {
            if let Some(value) = value.as_str().filter(|_| name != "chunk_size") {
                request = request.header(name, value);
            }
        }
        let request = request.header("Content-Length", length.to_string());
        let answer = request.send(SendBody::from_reader(&mut body));
        let answer = answer.map_err(|error| Trouble::Connection(format!("no answer: {error}")))?;
        let etag = answer.headers().get("etag").and_then(|etag| etag.to_str().ok()).map(str::to_string);
        read(answer).map(|_| etag.filter(|etag| !etag.is_empty()))
    }

    /// Makes everything visible at once: the commit.
    fn commit(&self, items: &[Item], message: &str) -> Result<String> {
        let mut lines = vec![json!({"key": "header", "value": {"summary": message, "description": ""}})];
        for item in items {
            lines.push(match &item.digest {
                Some(digest) => json!({
                    "key": "lfsFile",
                    "value": {"path": item.name, "algo": "sha256", "oid": digest, "size": item.bytes},
                }),
                None => {
                    let bytes =
                        fs::read(&item.path).map_err(|error| self.failure(&item.name, &Trouble::Disk(error)))?;
                    let content = BASE64_STANDARD.encode(bytes);
                    json!({"key": "file", "value": {"content": content, "path": item.name, "encoding": "base64"}})
                }
            });
        }
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let address = self.address("commit/main");
        let answer = self.repeat(|| self.post(&address, "application/x-ndjson", body.as_bytes()));
        let answer = answer.map_err(|trouble| self.failure("", &trouble))?;
        match answer["commitOid"].as_str() {
            Some(commit) => Ok(commit.to_string()),
            None => Err(self.failure("", &Trouble::Answer("the hub does not name the commit".into()))),
        }
    }

    fn post(&self, address: &str, kind: &str, body: &[u8]) -> Result<Value, Trouble> {
        let mut request = self.agent.post(address).header("Content-Type", kind).header("Accept", "application/json");
        // Only to the hub itself: a part's address carries its own signature.
        if address.starts_with(&format!("{}/", self.hub.endpoint)) {
            request = request.header("Authorization", &self.authorization);
        }
        if kind == LFS {
            request = request.header("Accept", LFS);
        }
        let answer = request.send(body).map_err(|error| Trouble::Connection(format!("no answer: {error}")))?;
        read(answer)
    }

    fn call(&self, request: ureq::RequestBuilder<ureq::typestate::WithoutBody>) -> Result<Value, Trouble> {
        let answer = request.header("Authorization", &self.authorization).call();
        read(answer.map_err(|error| Trouble::Connection(format!("no answer: {error}")))?)
    }

    /// Tries again after failures that may pass.
    fn repeat<T>(&self, mut attempt: impl FnMut() -> Result<T, Trouble>) -> Result<T, Trouble> {
        for number in 1..ATTEMPTS {
            match attempt() {
                Err(Trouble::Connection(_) | Trouble::Status(408 | 429 | 500.., _)) => {
                    std::thread::sleep(self.hub.pause * number);
                }
                other => return other,
            }
        }
        attempt()
    }

    fn failure(&self, file: &str, trouble: &Trouble) -> Error {
        let place = format!("{}/{}", self.hub.endpoint, self.id);
        let place = if file.is_empty() { place } else { format!("{place}: {file}") };
        let (what, hint) = match trouble {
            Trouble::Disk(error) => {
                return Error::Output(Fault::new(place, format_args!("the file cannot be read: {error}")));
            }
            Trouble::Status(401, message) => (
                format!("the hub does not know this token (401): {message}"),
                "log in with `hf auth login`, or set HF_TOKEN to one that may write",
            ),
            Trouble::Status(403, message) => (
                format!("the hub refuses (403): {message}"),
                "use a token that may write to this owner's repositories, or name your own: --push user/name",
            ),
            Trouble::Status(409, message) => (
                format!("the repository changed meanwhile (409): {message}"),
                "push again: what has arrived is not sent twice",
            ),
            Trouble::Status(413, message) => (
                format!("the hub does not take so much (413): {message}"),
                "push an adapter instead of a merged model, or quantise it",
            ),
            Trouble::Status(code, message) => (
                format!("the hub answered with the status {code}: {message}"),
                "push again: what has arrived is not sent twice",
            ),
            Trouble::Connection(what) => (
                what.clone(),
                "check the network (HTTPS_PROXY, HF_ENDPOINT) and push again: what has arrived is not sent twice",
            ),
            Trouble::Answer(what) => (what.clone(), "is HF_ENDPOINT the address of a hub?"),
        };
        Error::Network(Fault::new(place, what).hint(hint))
    }
}

/// What LFS's requests and answers are.
const LFS: &str = "application/vnd.git-lfs+json";

/// An answer's JSON; nothing where it has none.
fn read(mut answer: Response<Body>) -> Result<Value, Trouble> {
    let status = answer.status().as_u16();
    let mut bytes = Vec::new();
    let read = answer.body_mut().as_reader().take(MOST_BYTES).read_to_end(&mut bytes);
    read.map_err(|error| Trouble::Connection(format!("the connection broke off: {error}")))?;
    let value: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    if (200..300).contains(&status) {
        return Ok(value);
    }
    let said = value["error"].as_str().or(value["message"].as_str());
    let text = String::from_utf8_lossy(&bytes);
    let message: String = said.unwrap_or(&text).chars().take(200).collect();
    Err(Trouble::Status(status, if message.trim().is_empty() { "no word why".into() } else { message }))
}

#[cfg(test)]
mod tests;
