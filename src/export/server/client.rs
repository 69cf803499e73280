//! Questions to a server over HTTP: each within a time and a size, and with what is wrong said in a sentence.

use std::io::Read;
use std::net::IpAddr;
use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::{Body, Timeout};

use crate::Fault;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest answer that is read.
const MOST_BYTES: u64 = 16 << 20;
/// Characters shown of an answer that is not understood.
const SHOWN: usize = 200;

/// A server, and how it is asked.
pub(super) struct Client {
    agent: Agent,
    /// Scheme, host and port, and what of a path comes before `/v1`.
    address: String,
    authorization: Option<String>,
    patience: Duration,
}

/// Why a question got no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Nobody is there, or the connection broke off.
    Absent(String),
    /// No answer in time.
    Hangs(Duration),
    /// Another status than 200: what the server says of it.
    Status(u16, String),
    /// An answer that is none.
    Rubbish(String),
}

impl Client {
    /// Of a server's address as it is typed: `http://host:port`, with `/v1` behind it or not.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(typed: &str, key: Option<&str>, patience: Duration) -> Result<Self, Fault> {
        let address = typed.trim().trim_end_matches('/');
        let address = address.strip_suffix("/v1").unwrap_or(address);
        let behind = ["http://", "https://"].iter().find_map(|scheme| address.strip_prefix(scheme));
        // What is refused for this is not shown: it may be a password, or a key behind a `?`.
        let fault = |what: &str| Fault::new("--server", what);
        if authority(address).contains('@') {
            let what = "the address holds a user's name or a password, which would be shown wherever it is";
            return Err(
                fault(what).hint("put the key into an environment variable and name that: --api-key-env VARIABLE")
            );
        }
        if address.contains(['?', '#', '@']) {
            return Err(
                fault("the address has more in it than a host, a port and a path").hint("write http://host:port")
            );
        }
        match behind {
            Some(host) if !host.is_empty() && !host.starts_with('/') && !address.contains(char::is_whitespace) => {}
            _ => return Err(fault(&format!("{typed:?} is not the address of a server")).hint("write http://host:port")),
        }
        let config = Agent::config_builder()
            .user_agent(format!("engraft/{}", env!("CARGO_PKG_VERSION")))
            .accept("application/json")
            .accept_encoding("identity")
            .http_status_as_error(false)
            // A question that goes elsewhere is asked of another server than the one that was named.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::Never)
            .timeout_resolve(Some(CONNECT.min(patience)))
            .timeout_connect(Some(CONNECT.min(patience)))
            .timeout_global(Some(patience));
        Ok(Self {
            agent: config.build().into(),
            address: address.to_string(),
            authorization: key.map(|key| format!("Bearer {key}")),
            patience,
        })
    }

    /// Whether a key can be read by whoever is between here and the server.
    pub fn shows_its_key(&self) -> bool {
        self.authorization.is_some() && self.address.starts_with("http://") && !is_local(authority(&self.address))
    }

    /// The server's address.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What is at `path`.
    pub fn ask(&self, path: &str) -> Result<Value, Trouble> {
        let mut request = self.agent.get(format!("{}{path}", self.address));
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        self.read(request.call())
    }

    /// What `path` answers to `question`.
    pub fn post(&self, path: &str, question: &Value) -> Result<Value, Trouble> {
        let mut request = self.agent.post(format!("{}{path}", self.address)).header("Content-Type", "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        self.read(request.send(question.to_string()))
    }

    fn read(&self, answer: Result<Response<Body>, ureq::Error>) -> Result<Value, Trouble> {
        let mut answer = answer.map_err(|error| self.trouble(&error))?;
        let status = answer.status().as_u16();
        let header = |name: &str| {
            let value = answer.headers().get(name).and_then(|value| value.to_str().ok());
            value.unwrap_or_default().to_string()
        };
        let (kind, elsewhere) = (header("content-type"), header("location"));
        if status == 200 && kind.starts_with("text/event-stream") {
            return Err(Trouble::Rubbish("it streams, though a whole answer was asked for".into()));
        }
        let mut bytes = Vec::new();
        let read = answer.body_mut().as_reader().take(MOST_BYTES + 1).read_to_end(&mut bytes);
        if let Err(error) = read {
            let late = error.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>());
            return Err(match late {
                Some(error) => self.trouble(error),
                None => Trouble::Absent(format!("the connection broke off: {error}")),
            });
        }
        if bytes.len() as u64 > MOST_BYTES {
            return Err(Trouble::Rubbish(format!("its answer is longer than {} MiB", MOST_BYTES >> 20)));
        }
        let text = String::from_utf8_lossy(&bytes);
        if (300..400).contains(&status) {
            return Err(Trouble::Status(status, format!("it sends to {elsewhere}: name that address")));
        }
        if status != 200 {
            return Err(Trouble::Status(status, said(&text)));
        }
        serde_json::from_slice(&bytes)
            .map_err(|_| Trouble::Rubbish(format!("its answer is not JSON: {}", shortened(&text))))
    }

    fn trouble(&self, error: &ureq::Error) -> Trouble {
        match error {
            ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => {
                Trouble::Absent(format!("no connection within {:.0} s", CONNECT.min(self.patience).as_secs_f64()))
            }
            ureq::Error::Timeout(_) => Trouble::Hangs(self.patience),
            ureq::Error::Protocol(error) => Trouble::Rubbish(format!("it does not speak HTTP: {error}")),
            error => Trouble::Absent(error.to_string()),
        }
    }
}

/// What is between the scheme and the path: host and port.
fn authority(address: &str) -> &str {
    let behind = address.split_once("://").map_or(address, |(_, behind)| behind);
    behind.split(['/', '\\', '?', '#']).next().unwrap_or_default()
}

/// Whether a host is this machine.
fn is_local(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(behind) => behind.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    let named = host.eq_ignore_ascii_case("localhost") || host.to_ascii_lowercase().ends_with(".localhost");
    named || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// What a server says is wrong: the message in its JSON, in any of the ways servers put it.
fn said(text: &str) -> String {
    let value: Value = serde_json::from_str(text).unwrap_or(Value::Null);
    let places = [&value["error"]["message"], &value["message"], &value["error"], &value["detail"]];
    let message = places.into_iter().find(|place| !place.is_null());
    match message {
        Some(Value::String(message)) => shortened(message),
        Some(other) => shortened(&other.to_string()),
        None => shortened(text),
    }
}

/// The beginning of what a server sent: it may be of any length, and of anything.
pub(super) fn shortened(text: &str) -> String {
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut shown: String = line.chars().take(SHOWN).collect();
    if shown.len() < line.len() {
        shown += "...";
    }
    if shown.is_empty() { "nothing".into() } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_with_and_without_v1() {
        let address = |typed| Client::new(typed, None, CONNECT).map(|client| client.address().to_string());
        assert_eq!(address("http://localhost:8000/v1/").unwrap(), "http://localhost:8000");
        assert_eq!(address("https://models.example/team").unwrap(), "https://models.example/team");
        for wrong in ["localhost:8000", "ftp://x", "http://", "http:///v1", "http://a b"] {
            let text = address(wrong).unwrap_err().to_string();
            assert!(text.contains(wrong) && text.contains("write http://host:port"), "{text}");
        }
    }

    #[test]
    fn passwords_in_an_address_are_refused_and_not_shown() {
        for typed in
            ["http://user:secret@host:8000/v1", "ftp://secret@host", "user:secret@host", "https://:secret@[::1]:80"]
        {
            let text = Client::new(typed, None, CONNECT).err().unwrap().to_string();
            assert!(text.contains("--api-key-env") && !text.contains("secret"), "{text}");
        }
        for typed in ["http://host/?key=secret", "http://host#secret", "http:/user:secret@host"] {
            let text = Client::new(typed, None, CONNECT).err().unwrap().to_string();
            assert!(text.contains("write http://host:port") && !text.contains("secret"), "{text}");
        }
    }

    #[test]
    fn a_key_in_plain_sight_is_noticed() {
        let shows = |typed: &str, key: Option<&str>| Client::new(typed, key, CONNECT).unwrap().shows_its_key();
        for far in
            ["http://models.example:8000", "http://10.0.0.7/v1", "http://[2001:db8::1]:80", "http://localhost.example"]
        {
            assert!(shows(far, Some("word")) && !shows(far, None), "{far}");
            assert!(!shows(&far.replace("http:", "https:"), Some("word")), "{far}");
        }
        for here in ["http://localhost:8000", "http://127.0.0.1:1", "http://[::1]:8000/v1", "http://a.LOCALHOST"] {
            assert!(!shows(here, Some("word")), "{here}");
        }
    }

    #[test]
    fn what_servers_say_is_found_wherever_they_put_it() {
        for (text, message) in [
            (r#"{"error": {"message": "no such model", "code": 404}}"#, "no such model"),
            (r#"{"error": "model 'x' not found"}"#, "model 'x' not found"),
            (r#"{"object": "error", "message": "busy"}"#, "busy"),
            (r#"{"detail": [{"loc": ["prompt"]}]}"#, r#"[{"loc":["prompt"]}]"#),
            ("<html>\n  Bad Gateway</html>", "<html> Bad Gateway</html>"),
            ("", "nothing"),
        ] {
            assert_eq!(said(text), message);
        }
        assert_eq!(shortened(&"ä".repeat(999)).chars().count(), SHOWN + 3);
    }
}
