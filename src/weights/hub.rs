//! Models by name from a Hugging Face hub, through its cache on disk (the one Python's `huggingface_hub` uses).
//!
//! Only what is needed is fetched: config, tokenizer, safetensors; never a pickle. The environment says where and as whom:
//! `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` (or the token file of `hf auth login`), `HF_HUB_OFFLINE`.

mod transfer;
mod upload;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, Repo, RepoType};

use self::transfer::{Client, Trouble};
use super::folder::{self, INDEX, Index, SIDECARS, SINGLE};
use super::sha256_file;
use super::tekken;
use crate::{Error, Fault, Result};

pub use upload::{Push, Pushed};

/// Attempts per file when the network fails; each continues where the last one stopped.
const ATTEMPTS: u32 = 4;

/// How long a hub may take to answer before it counts as out of reach.
const PATIENCE: Duration = Duration::from_secs(20);

/// A hub, its cache and who asks.
#[derive(Debug, Clone)]
pub struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    /// Before the second attempt; longer before each further one.
    pause: Duration,
    patience: Duration,
}

/// A model in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The folder with its files (links into the cache).
    pub folder: PathBuf,
    /// The commit they belong to.
    pub commit: String,
    /// What the user should know: that the hub could not be reached and the cached model is used, say.
    pub notice: Option<String>,
}

/// How far a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer<'a> {
    /// The file's name in its repository.
    pub file: &'a str,
    /// Bytes here.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

impl Hub {
    /// Whether it is asked with a token.
    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// The hub that the environment describes.
    pub fn from_environment() -> Result<Self> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let variable =
            |name: &str| variable(name).map(|value| value.trim().to_string()).filter(|value| !value.is_empty());
        let on = |name: &str| {
            variable(name).is_some_and(|value| matches!(value.to_lowercase().as_str(), "1" | "true" | "yes" | "on"))
        };
        let home = variable("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| variable("XDG_CACHE_HOME").map(|cache| PathBuf::from(cache).join("huggingface")))
            .or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".cache/huggingface")));
        let Some(home) = home else {
            let fault = Fault::new("environment", "neither HF_HOME nor HOME says where the hub's cache is");
            return Err(Error::Network(fault.hint("set HF_HOME to a folder")));
        };
        let cache = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"].iter().find_map(|name| variable(name));
        let cache = cache.map_or_else(|| home.join("hub"), PathBuf::from);
        let token_file = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = variable("HF_TOKEN")
            .or_else(|| variable("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| fs::read_to_string(token_file).ok())
            .map(|token| token.trim().to_string())
            .filter(|token| !token.is_empty());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            cache: std::path::absolute(&cache).unwrap_or(cache),
            token,
            offline: on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
            pause: Duration::from_millis(500),
            patience: PATIENCE,
        })
    }

    /// Makes sure that the model `id` (`owner/name`) at `revision` (branch, tag or commit) is in the cache, and says where.
    ///
    /// A commit that is in the cache needs no network. When the hub cannot be reached, a cached model is used, with a notice.
    /// Errors: [`Error::Network`] when the hub cannot be reached or refuses; [`Error::Model`] when the repository holds no
    /// safetensors.
    pub fn fetch(&self, id: &str, revision: &str, progress: &mut dyn FnMut(Transfer)) -> Result<Fetched> {
        check_name(id, revision)?;
        let cached = self.cached(id, revision);
        if is_commit(revision)
            && let Some(fetched) = &cached
        {
            return Ok(fetched.clone());
        }
        if self.offline {
            return cached.ok_or_else(|| {
                let what = format_args!("{id} at {revision} is not in the cache {}", self.cache.display());
                let hint = "unset HF_HUB_OFFLINE to fetch it, or name a folder";
                Error::Network(Fault::new("HF_HUB_OFFLINE is set", what).hint(hint))
            });
        }
        match (self.download(id, revision, progress), cached) {
            (Err(Failure::Unreachable(fault)), Some(cached)) => {
                let notice = format!("the hub could not be reached, so the cached {id} is used ({})", fault.what);
                Ok(Fetched { notice: Some(notice), ..cached })
            }
            (Err(Failure::Unreachable(fault)), None) => Err(Error::Network(fault)),
            (Err(Failure::Final(error)), _) => Err(error),
            (Ok(fetched), _) => Ok(fetched),
        }
    }

    /// The model card (`README.md`) of a repository at a commit: asked for once, and nothing where it cannot be had, as no run
    /// depends on it.
    pub fn card(&self, id: &str, commit: &str) -> Option<String> {
        const MOST_BYTES: u64 = 1 << 20;
        const SHORT: Duration = Duration::from_secs(5);
        if self.offline || check_name(id, commit).is_err() {
            return None;
        }
        let client = Client::new(self.token.as_deref(), self.patience.min(SHORT));
        client.text(&format!("{}/{id}/resolve/{commit}/README.md", self.endpoint), MOST_BYTES).ok()
    }

    /// A complete copy of the model in the cache.
    fn cached(&self, id: &str, revision: &str) -> Option<Fetched> {
        let cache = Cache::new(self.cache.clone());
        let repository = cache.path().join(Repo::model(id.to_string()).folder_name());
        let commit = match fs::read_to_string(repository.join("refs").join(revision)) {
            Ok(commit) => commit.trim().to_string(),
            Err(_) if is_commit(revision) => revision.to_string(),
            Err(_) => return None,
        };
        let folder = repository.join("snapshots").join(&commit);
        let complete = is_commit(&commit)
            && folder.join("config.json").is_file()
            && (folder.join(SINGLE).is_file()
                || fs::read(folder.join(INDEX)).is_ok_and(|bytes| {
                    Index::parse(&folder.join(INDEX), &bytes)
                        .is_ok_and(|index| index.weight_map.iter().all(|(_, shard)| folder.join(shard).is_file()))
                }));
        complete.then_some(Fetched { folder, commit, notice: None })
    }

    fn download(&self, id: &str, revision: &str, progress: &mut dyn FnMut(Transfer)) -> Result<Fetched, Failure> {
        let remote = Remote { hub: self, id, revision };
        let client = Client::new(self.token.as_deref(), self.patience);
        let model = |revision: &str| Repo::with_revision(id.to_string(), RepoType::Model, revision.to_string());
        let address = format!("{}/api/{}", self.endpoint, model(revision).api_url());
        let info = remote.repeat(|| client.description(&address).map_err(|trouble| remote.failure("", &trouble)))?;
        let commit = info.sha;
        if !is_commit(&commit) {
            let fault = Fault::new(remote.place(""), format_args!("the hub answered with the commit {commit:?}"));
            return Err(Failure::Final(Error::Network(fault)));
        }
        let names: BTreeSet<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        // All files of one commit, whatever happens to the branch meanwhile.
        let addresses = format!("{}/{}/resolve/{commit}", self.endpoint, model(&commit).url());
        let cache = Cache::new(self.cache.clone());
        let folder = cache.repo(model(&commit)).pointer_path(&commit);
        let mut fetch = |name: &str| remote.file(&client, &format!("{addresses}/{name}"), &folder, name, progress);

        let place = PathBuf::from(remote.place(""));
        if !names.contains("config.json") {
            let fault = Fault::at(&place, "the repository holds no config.json: it is not a transformers model");
            return Err(Failure::Final(Error::Model(fault)));
        }
        if !names.contains(SINGLE) && !names.contains(INDEX) {
            let names: Vec<String> = names.into_iter().collect();
            return Err(Failure::Final(folder::refuse_others(&place, &names)));
        }
        for name in ["config.json"].into_iter().chain(SIDECARS).filter(|name| names.contains(*name)) {
            fetch(name)?;
        }
        if !names.contains("tokenizer.json") && names.contains(tekken::FILE) {
            fetch(tekken::FILE)?;
        }
        if names.contains(SINGLE) {
            fetch(SINGLE)?;
        } else {
            let path = fetch(INDEX)?;
            let bytes = fs::read(&path).map_err(|error| Failure::Final(super::file::unreadable(&path, &error)))?;
            let index = Index::parse(&path, &bytes).map_err(Failure::Final)?;
            let shards: BTreeSet<&str> = index.weight_map.iter().map(|(_, shard)| shard.as_str()).collect();
            for shard in &shards {
                folder::check_shard_name(&path, shard).map_err(Failure::Final)?;
                if !names.contains(*shard) {
                    let what = format_args!("names the shard {shard}, which the repository does not hold");
                    return Err(Failure::Final(Error::Model(Fault::at(&path, what))));
                }
            }
            for shard in shards {
                fetch(shard)?;
            }
        }
        cache.repo(model(revision)).create_ref(&commit).map_err(|error| {
            let fault = Fault::at(&self.cache, format_args!("the hub's cache cannot be written: {error}"));
            Failure::Final(Error::Output(fault))
        })?;
        Ok(Fetched { folder, commit, notice: None })
    }
}

/// Why a download did not happen.
enum Failure {
    /// Nobody answered: a cached copy may do.
    Unreachable(Fault),
    /// An answer that another attempt would not change.
    Final(Error),
}

/// A repository on a hub, for requests and errors.
struct Remote<'a> {
    hub: &'a Hub,
    id: &'a str,
    revision: &'a str,
}

impl Remote<'_> {
    fn place(&self, file: &str) -> String {
        let place = format!("{}/{} at {}", self.hub.endpoint, self.id, self.revision);
        if file.is_empty() { place } else { format!("{place}: {file}") }
    }

    /// Fetches one file into the cache, unless it is there, and checks its size and digest.
    fn file(
        &self,
        client: &Client,
        address: &str,
        folder: &Path,
        name: &str,
        progress: &mut dyn FnMut(Transfer),
    ) -> Result<PathBuf, Failure> {
        let path = folder.join(name);
        if path.is_file() {
            return Ok(path);
        }
        let cache = Cache::new(self.hub.cache.clone()).repo(Repo::model(self.id.to_string()));
        self.repeat(|| {
            let failure = |trouble| self.failure(name, &trouble);
            let blob = client.blob(address).map_err(failure)?;
            // It becomes a file's name in the cache, and comes from whoever answers.
            check_digest(&blob.etag).map_err(|fault| Failure::Final(self.network(name, fault)))?;
            let stored = cache.blob_path(&blob.etag);
            client
                .download(address, &stored, blob.size, &mut |done| {
                    progress(Transfer { file: name, done, total: blob.size });
                })
                .map_err(failure)?;
            transfer::link(&stored, &path).map_err(|error| failure(Trouble::Disk(error)))?;
            self.verify(&path, name, blob.size)?;
            Ok(path.clone())
        })
    }

    /// A file in the cache must be as long as the hub says, and large ones must have the digest they are stored under.
    fn verify(&self, path: &Path, name: &str, total: u64) -> Result<(), Failure> {
        let damaged = |what: String| {
            // Whole or not at all: a damaged file must not be found by the next run.
            for file in [path.canonicalize().ok(), Some(path.to_path_buf())].into_iter().flatten() {
                let _ = fs::remove_file(file);
            }
            Failure::Unreachable(Fault::new(self.place(name), what).hint("try again"))
        };
        let length = path.metadata().map(|metadata| metadata.len()).unwrap_or(0);
        if length != total {
            return Err(damaged(format!("{length} bytes arrived of {total}")));
        }
        let blob = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let digest = blob.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let found = sha256_file(path).map_err(Failure::Final)?;
            if found != digest.to_lowercase() {
                return Err(damaged(format!("its SHA-256 is {found}, but should be {digest}")));
            }
        }
        Ok(())
    }

    /// Tries again after failures that may pass.
    fn repeat<T>(&self, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
        for number in 1..ATTEMPTS {
            match attempt() {
                Err(Failure::Unreachable(_)) => std::thread::sleep(self.hub.pause * number),
                other => return other,
            }
        }
        attempt()
    }

    fn failure(&self, file: &str, trouble: &Trouble) -> Failure {
        match trouble {
            Trouble::Disk(error) => {
                let what = format!("the hub's cache {} cannot be written: {error}", self.hub.cache.display());
                let fault = Fault::new(self.place(file), what);
                Failure::Final(Error::Output(fault.hint("free space, or set HF_HOME to another disk")))
            }
            Trouble::Taken(path) => {
                let fault = Fault::at(path, "another process is fetching this file");
                Failure::Final(Error::Output(fault.hint("wait for it, or end it")))
            }
            Trouble::Connection(_) | Trouble::Status(408 | 429 | 500..) => {
                Failure::Unreachable(self.fault(file, trouble))
            }
            Trouble::Status(_) | Trouble::Answer(_) => Failure::Final(Error::Network(self.fault(file, trouble))),
        }
    }

    fn network(&self, file: &str, fault: Fault) -> Error {
        Error::Network(Fault { place: self.place(file), ..fault })
    }

    fn fault(&self, file: &str, trouble: &Trouble) -> Fault {
        let page = format!("{}/{}", self.hub.endpoint, self.id);
        let (what, hint) = match (trouble, &self.hub.token) {
            (Trouble::Status(404), _) => (
                "not found (404)".to_string(),
                format!("check the spelling and the revision {:?}; or name a folder as ./folder", self.revision),
            ),
            (Trouble::Status(401), None) => (
                "the hub refuses (401): no such model, or it is private or gated".to_string(),
                format!(
                    "check the spelling; accept its terms at {page}; then log in with `hf auth login` or set HF_TOKEN"
                ),
            ),
            (Trouble::Status(code @ (401 | 403)), _) => (
                format!("the hub refuses this token ({code}): the model is private or gated, or there is none"),
                format!("check the spelling; accept its terms at {page} with the account of HF_TOKEN"),
            ),
            (Trouble::Status(429), _) => {
                ("the hub asks to slow down (429)".to_string(), "wait, or set HF_TOKEN".to_string())
            }
            (Trouble::Status(code), _) => {
                (format!("the hub answered with the status {code}"), "try again later".to_string())
            }
            (trouble, _) => (
                trouble.to_string(),
                "check the network (HTTPS_PROXY, HF_ENDPOINT), or fetch the model elsewhere and name its folder"
                    .to_string(),
            ),
        };
        Fault::new(self.place(file), what).hint(hint)
    }
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Names become parts of paths and addresses: only what the hub itself allows.
fn check_name(id: &str, revision: &str) -> Result<()> {
    let plain = |part: &str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        !part.is_empty() && !part.starts_with('.') && !part.contains("..") && part.bytes().all(allowed)
    };
    if !(1..=2).contains(&id.split('/').count()) || !id.split('/').all(plain) {
        let fault = Fault::new(format_args!("{id:?}"), "is not a model's name on the hub");
        return Err(Error::Network(fault.hint("write owner/name, or a folder as ./folder")));
    }
    if !revision.split('/').all(plain) {
        let fault = Fault::new(format_args!("{id} at {revision:?}"), "is not a branch, tag or commit");
        return Err(Error::Network(fault));
    }
    Ok(())
}

/// What a hub says a file is (its ETag) names it in the cache: one plain name, never a path.
fn check_digest(etag: &str) -> Result<(), Fault> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if (1..=200).contains(&etag.len()) && !etag.starts_with('.') && etag.bytes().all(allowed) {
        return Ok(());
    }
    let what =
        format!("the hub calls this file's contents {etag:?} (ETag), expected letters, digits, `-`, `_` and `.`");
    Err(Fault::new("", what).hint("do not use this hub: HF_ENDPOINT or a proxy (HTTPS_PROXY) leads to it"))
}

#[cfg(test)]
mod tests;
