//! The hub, against a stand-in for it on this machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one repository, `owner/model`.
#[derive(Default)]
struct Repository {
    files: BTreeMap<&'static str, Vec<u8>>,
    /// Status to answer with instead of the repository's description, then of files.
    refuse: Option<u16>,
    refuse_files: Option<u16>,
    /// Bytes after which the next large answer breaks off.
    break_after: Option<usize>,
    /// What files are said to be, where it is not their SHA-256.
    etag: Option<String>,
    /// Wait before each answer, and before each byte of a file.
    silent: Option<Duration>,
    drips: Option<Duration>,
    /// Requests so far: path, range, authorization.
    requests: Vec<(String, String, String)>,
}

struct Server {
    repository: Arc<Mutex<Repository>>,
    endpoint: String,
    cache: tempfile::TempDir,
}

impl Server {
    fn start(files: &[(&'static str, &[u8])]) -> Self {
        let files = files.iter().map(|(name, bytes)| (*name, bytes.to_vec())).collect();
        let repository = Arc::new(Mutex::new(Repository { files, ..Repository::default() }));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let shared = repository.clone();
        // Lives until the test's process ends.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that hangs up is what some of these tests are about.
                let _ = answer(stream, &shared);
            }
        });
        Self { repository, endpoint, cache: tempfile::tempdir().unwrap() }
    }

    fn hub(&self) -> Hub {
        Hub {
            endpoint: self.endpoint.clone(),
            cache: self.cache.path().to_path_buf(),
            token: None,
            offline: false,
            pause: Duration::from_millis(1),
            patience: Duration::from_secs(5),
        }
    }

    fn edit(&self, edit: impl FnOnce(&mut Repository)) {
        edit(&mut self.repository.lock().unwrap());
    }

    fn requests(&self) -> Vec<(String, String, String)> {
        std::mem::take(&mut self.repository.lock().unwrap().requests)
    }
}

fn answer(mut stream: TcpStream, repository: &Mutex<Repository>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = request.split(' ').nth(1).unwrap_or_default().to_string();
    let (mut range, mut authorization) = (String::new(), String::new());
    for line in lines {
        let line = line?;
        match line.split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("range") => range = value.to_string(),
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => authorization = value.to_string(),
            Some(_) => {}
            None => break,
        }
    }
    let (silent, drips) = repository.lock().map(|repository| (repository.silent, repository.drips)).unwrap();
    std::thread::sleep(silent.unwrap_or_default());
    let mut repository = repository.lock().unwrap();
    repository.requests.push((path.clone(), range.clone(), authorization));
    let mut reply = |status: u16, headers: &str, body: &[u8], sent: usize| -> std::io::Result<()> {
        let length = body.len();
        write!(stream, "HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n")?;
        if let Some(wait) = drips.filter(|_| status == 206) {
            return body.iter().try_for_each(|byte| {
                std::thread::sleep(wait);
                stream.write_all(&[*byte])
            });
        }
        stream.write_all(&body[..sent.min(length)])
    };
    let refused = |status: u16| (status, b"refused".as_slice());
    if path.starts_with("/api/models/owner/model/revision/main") {
        if let Some((status, body)) = repository.refuse.map(refused) {
            return reply(status, "", body, usize::MAX);
        }
        let siblings: Vec<_> = repository.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return reply(200, "Content-Type: application/json\r\n", body.as_bytes(), usize::MAX);
    }
    let prefix = format!("/owner/model/resolve/{COMMIT}/");
    let Some(body) = path.strip_prefix(&prefix).and_then(|name| repository.files.get(name)).cloned() else {
        return reply(404, "", b"", 0);
    };
    if let Some((status, body)) = repository.refuse_files.map(refused) {
        return reply(status, "", body, usize::MAX);
    }
    let digest = Sha256::digest(&body).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let etag = repository.etag.clone().unwrap_or(digest);
    let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().map_or(body.len(), |to: usize| to + 1));
    if from >= body.len() {
        return reply(416, "", b"", 0);
    }
    let to = to.min(body.len());
    let total = body.len();
    let headers =
        format!("ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {from}-{}/{total}\r\n", to - 1);
    let sent = if to - from > 1 { repository.break_after.take().unwrap_or(usize::MAX) } else { usize::MAX };
    reply(206, &headers, &body[from..to], sent)
}

const SINGLE_MODEL: &[(&str, &[u8])] = &[
    ("config.json", b"{}"),
    ("tokenizer.json", b"{\"version\": \"1.0\"}"),
    ("model.safetensors", b"0123456789"),
    ("pytorch_model.bin", b"pickle"),
    ("README.md", b"words"),
];

fn fetch(hub: &Hub) -> Result<Fetched> {
    hub.fetch("owner/model", "main", &mut |_| {})
}

fn network_fault(hub: &Hub) -> String {
    let error = fetch(hub).unwrap_err();
    assert_eq!(error.exit_code(), 11, "{error}");
    error.to_string()
}

#[test]
fn only_what_is_needed_is_fetched_and_only_once() {
    let server = Server::start(SINGLE_MODEL);
    let mut transfers = Vec::new();
    let fetched = server
        .hub()
        .fetch("owner/model", "main", &mut |transfer| {
            transfers.push((transfer.file.to_string(), transfer.done, transfer.total));
        })
        .unwrap();
    assert_eq!(fetched.commit, COMMIT);
    assert_eq!(fs::read(fetched.folder.join("model.safetensors")).unwrap(), b"0123456789");
    let mut names: Vec<_> = fs::read_dir(&fetched.folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(transfers.last().unwrap(), &("model.safetensors".to_string(), 10, 10));
    assert!(!server.requests().iter().any(|(path, ..)| path.contains(".bin") || path.contains("README")));

    // The second time asks only whether the branch has moved; a commit asks nothing.
    assert_eq!(fetch(&server.hub()).unwrap(), fetched);
    assert_eq!(server.requests().len(), 1);
    assert_eq!(server.hub().fetch("owner/model", COMMIT, &mut |_| {}).unwrap(), fetched);
    assert_eq!(server.requests().len(), 0);
}

#[test]
fn shards_named_by_the_index_are_fetched() {
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    let server = Server::start(&[
        ("config.json", b"{}"),
        (INDEX, index),
        ("model-1.safetensors", b"one"),
        ("model-2.safetensors", b"two"),
        ("model-3.safetensors", b"three"),
    ]);
    let folder = fetch(&server.hub()).unwrap().folder;
    assert_eq!(fs::read(folder.join("model-2.safetensors")).unwrap(), b"two");
    assert!(!folder.join("model-3.safetensors").exists());

    for (shard, expected) in [("../../x", "not a plain name"), ("x.bin", "a pickle"), ("gone", "does not hold")] {
        let index = format!(r#"{{"weight_map": {{"a": "{shard}"}}}}"#);
        let server = Server::start(&[("config.json", b"{}"), (INDEX, index.as_bytes())]);
        let error = fetch(&server.hub()).unwrap_err();
        assert!(error.exit_code() == 5 && error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn repositories_without_safetensors_are_refused_by_name() {
    let server = Server::start(&[("config.json", b"{}"), ("pytorch_model.bin", b"pickle")]);
    let text = fetch(&server.hub()).unwrap_err().to_string();
    assert!(text.contains("owner/model") && text.contains("pytorch_model.bin"), "{text}");
    assert!(server.requests().iter().all(|(path, ..)| !path.contains(".bin")));
    let server = Server::start(&[("model.gguf", b"GGUF")]);
    assert!(fetch(&server.hub()).unwrap_err().to_string().contains("no config.json"));
}

#[test]
fn refusals_say_the_way_out() {
    let server = Server::start(SINGLE_MODEL);
    for (status, token, expected) in [
        (404, None, "not found (404)"),
        (401, None, "set HF_TOKEN"),
        (401, Some("secret"), "refuses this token (401)"),
        (403, Some("secret"), "accept its terms at"),
        (500, None, "status 500"),
    ] {
        server.edit(|repository| repository.refuse = Some(status));
        let hub = Hub { token: token.map(str::to_string), ..server.hub() };
        let text = network_fault(&hub);
        assert!(text.contains(expected) && text.contains("owner/model") && !text.contains("secret"), "{text}");
        let requests = server.requests();
        assert_eq!(requests.len(), if status == 500 { ATTEMPTS as usize } else { 1 });
        assert_eq!(requests[0].2, token.map_or(String::new(), |token| format!("Bearer {token}")));
    }
    // A gated repository describes itself, but refuses its files.
    server.edit(|repository| (repository.refuse, repository.refuse_files) = (None, Some(401)));
    assert!(network_fault(&server.hub()).contains("config.json: the hub refuses (401)"));
    for (id, revision) in [("../x/y", "main"), ("a/b/c", "main"), ("a/..", "main"), ("a/b", "../x"), ("a/b", "")] {
        assert!(server.hub().fetch(id, revision, &mut |_| {}).unwrap_err().to_string().contains("is not a"), "{id}");
    }
}

#[test]
fn an_interrupted_download_continues_where_it_stopped() {
    let large: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    let server = Server::start(&[("config.json", b"{}"), ("model.safetensors", &large)]);
    // A file of one byte is not broken off: the model is.
    server.edit(|repository| repository.files.extend([("config.json", b"{".to_vec())]));
    server.edit(|repository| repository.break_after = Some(200_000));
    let fetched = fetch(&server.hub()).unwrap();
    assert_eq!(fs::read(fetched.folder.join("model.safetensors")).unwrap(), large);
    let ranges: Vec<_> = server
        .requests()
        .into_iter()
        .filter(|(path, range, _)| path.ends_with("model.safetensors") && range != "bytes=0-0")
        .map(|(_, range, _)| range)
        .collect();
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert_eq!(ranges[0], "bytes=0-");
    assert_ne!(ranges[1], "bytes=0-");
}

#[test]
fn a_leftover_that_is_whole_does_not_block_the_download() {
    let server = Server::start(SINGLE_MODEL);
    let folder = Repo::model("owner/model".to_string()).folder_name();
    let blobs = server.cache.path().join(folder).join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    let digest = sha256(b"0123456789");
    for leftover in [b"0123456789".as_slice(), b"0123456789 and more"] {
        fs::write(blobs.join(format!("{digest}.part")), leftover).unwrap();
        let fetched = fetch(&server.hub()).unwrap();
        assert_eq!(fs::read(fetched.folder.join("model.safetensors")).unwrap(), b"0123456789");
        fs::remove_file(fetched.folder.join("model.safetensors")).unwrap();
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let server = Server::start(SINGLE_MODEL);
    let file = server.cache.path().join("file");
    fs::write(&file, "").unwrap();
    let error = fetch(&Hub { cache: file, ..server.hub() }).unwrap_err();
    assert!(error.exit_code() == 6 && error.to_string().contains("cannot be written"), "{error}");
}

#[test]
fn a_file_with_another_digest_is_removed() {
    let server = Server::start(SINGLE_MODEL);
    server.edit(|repository| repository.etag = Some("ab".repeat(32)));
    let text = network_fault(&server.hub());
    assert!(text.contains("its SHA-256 is") && text.contains("abab"), "{text}");
    server.edit(|repository| repository.etag = None);
    fetch(&server.hub()).unwrap();
}

#[test]
fn an_etag_never_becomes_a_path() {
    let server = Server::start(SINGLE_MODEL);
    let victim = tempfile::tempdir().unwrap();
    let outside = victim.path().join("victim");
    fs::write(&outside, "mine").unwrap();
    let absolute = outside.to_str().unwrap();
    for etag in [absolute, "../../../../evil", "..", ".", "", "a/b", "a\\b", "a b", &"a".repeat(201)] {
        server.edit(|repository| repository.etag = Some(etag.to_string()));
        let text = network_fault(&server.hub());
        assert!(text.contains("config.json") && text.contains("ETag") && text.contains("HF_ENDPOINT"), "{text}");
        assert!(fs::read_dir(server.cache.path()).unwrap().next().is_none(), "{etag}: something was written");
    }
    assert_eq!(fs::read(&outside).unwrap(), b"mine");
    assert_eq!(fs::read_dir(victim.path()).unwrap().count(), 1);
}

#[test]
fn a_hub_that_says_nothing_or_drips_is_out_of_reach() {
    let server = Server::start(SINGLE_MODEL);
    let hub = Hub { patience: Duration::from_millis(200), ..server.hub() };
    server.edit(|repository| repository.silent = Some(Duration::from_secs(2)));
    let began = std::time::Instant::now();
    let text = network_fault(&hub);
    assert!(text.contains("timeout") && text.contains("check the network"), "{text}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());

    let server = Server::start(&[("config.json", &[b' '; 1000])]);
    server.edit(|repository| {
        repository.files.insert("model.safetensors", Vec::new());
        repository.drips = Some(Duration::from_millis(50));
    });
    let hub = Hub { patience: Duration::from_millis(200), ..server.hub() };
    let began = std::time::Instant::now();
    let text = network_fault(&hub);
    assert!(text.contains("timeout") && text.contains("config.json"), "{text}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn without_a_network_the_cache_is_used() {
    let server = Server::start(SINGLE_MODEL);
    let nowhere = Hub { endpoint: "http://127.0.0.1:9".to_string(), ..server.hub() };
    let text = network_fault(&nowhere);
    assert!(text.contains("check the network"), "{text}");
    let offline = Hub { offline: true, ..nowhere.clone() };
    assert!(network_fault(&offline).contains("is not in the cache"));

    let fetched = fetch(&server.hub()).unwrap();
    assert_eq!(fetch(&offline).unwrap(), fetched);
    let cached = fetch(&nowhere).unwrap();
    assert_eq!(cached.folder, fetched.folder);
    assert!(cached.notice.unwrap().contains("could not be reached"));
    // A copy that is not complete does not count.
    fs::remove_file(fetched.folder.join("model.safetensors")).unwrap();
    assert!(network_fault(&offline).contains("is not in the cache"));
}

#[test]
fn the_environment_is_read_as_by_huggingface_hub() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().to_str().unwrap().to_string();
    let hub = |variables: &[(&str, &str)]| {
        let variables: BTreeMap<_, _> = variables.iter().map(|(name, value)| (*name, value.to_string())).collect();
        Hub::from_variables(|name| variables.get(name).cloned())
    };
    let plain = hub(&[("HOME", "/home/me")]).unwrap();
    assert_eq!(plain.cache, Path::new("/home/me/.cache/huggingface/hub"));
    assert_eq!((plain.endpoint.as_str(), plain.token, plain.offline), ("https://huggingface.co", None, false));
    fs::write(folder.path().join("token"), " from-file\n").unwrap();
    let file =
        hub(&[("HF_HOME", &home), ("HF_ENDPOINT", "https://mirror.example/"), ("HF_HUB_OFFLINE", "YES")]).unwrap();
    assert_eq!(file.token.as_deref(), Some("from-file"));
    assert_eq!((file.endpoint.as_str(), file.offline), ("https://mirror.example", true));
    let token = hub(&[("HF_HOME", &home), ("HF_TOKEN", "named"), ("HF_HUB_CACHE", "/cache")]).unwrap();
    assert_eq!((token.token.as_deref(), token.cache.as_path()), (Some("named"), Path::new("/cache")));
    assert!(hub(&[]).unwrap_err().to_string().contains("HF_HOME"));
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
