//! Credentials as a CRI client sends them, and the challenge a registry answers with (RFC 9110,
//! section 11; distribution-spec token authentication).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Mirrors the CRI's AuthConfig; empty strings mean "not given".
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Auth {
    pub username: String,
    pub password: String,
    /// `base64(username:password)`, taken when there is no user name.
    pub auth: String,
    /// Exchanged for an access token at the registry's token service.
    pub identity_token: String,
    /// Sent to the registry as it is.
    pub registry_token: String,
    /// When given, the credentials go to this registry only.
    pub server_address: String,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth").field("username", &self.username).finish_non_exhaustive()
    }
}

/// What is sent to whom, resolved from an [`Auth`].
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Credentials {
    #[default]
    None,
    Basic {
        username: String,
        password: String,
    },
    Identity(String),
    Bearer(String),
}

impl Auth {
    /// The credentials for a registry; none when they were given for another one.
    pub fn credentials(&self, registry: &str) -> Credentials {
        if !self.server_address.is_empty() && host_of(&self.server_address) != host_of(registry) {
            return Credentials::None;
        }
        if !self.registry_token.is_empty() {
            return Credentials::Bearer(self.registry_token.clone());
        }
        if !self.identity_token.is_empty() {
            return Credentials::Identity(self.identity_token.clone());
        }
        let decoded = (self.username.is_empty() && !self.auth.is_empty())
            .then(|| STANDARD.decode(self.auth.trim()).ok())
            .flatten()
            .and_then(|bytes| String::from_utf8(bytes).ok());
        if let Some((username, password)) = decoded.as_deref().and_then(|d| d.split_once(':')) {
            let password = password.trim_end_matches('\0');
            return Credentials::Basic { username: username.into(), password: password.into() };
        }
        match self.username.as_str() {
            "" => Credentials::None,
            username => {
                Credentials::Basic { username: username.into(), password: self.password.clone() }
            }
        }
    }
}

/// `https://index.docker.io/v1/` and `docker.io` are the same place.
fn host_of(address: &str) -> &str {
    let address = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = address.split('/').next().unwrap_or(address);
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

/// A `WWW-Authenticate` header.
#[derive(Debug, PartialEq, Eq)]
pub enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    pub fn parse(header: &str) -> Option<Self> {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service, mut scope) = (None, None, None);
        for (key, value) in parameters(rest) {
            match key.to_ascii_lowercase().as_str() {
                "realm" => realm = Some(value),
                "service" => service = Some(value),
                "scope" => scope = Some(value),
                _ => {}
            }
        }
        Some(Self::Bearer { realm: realm?, service, scope })
    }
}

/// `key=value` and `key="value"`, with commas between (and inside of quotes).
fn parameters(mut text: &str) -> Vec<(String, String)> {
    let mut parameters = Vec::new();
    while let Some((key, rest)) = text.split_once('=') {
        let key = key.trim_matches([' ', ',']).to_owned();
        let mut value = String::new();
        text = match rest.strip_prefix('"') {
            Some(quoted) => {
                let mut chars = quoted.char_indices();
                let mut end = quoted.len();
                while let Some((at, c)) = chars.next() {
                    match c {
                        '"' => {
                            end = at + 1;
                            break;
                        }
                        '\\' => value.extend(chars.next().map(|(_, c)| c)),
                        c => value.push(c),
                    }
                }
                &quoted[end..]
            }
            None => {
                let end = rest.find(',').unwrap_or(rest.len());
                value.push_str(rest[..end].trim());
                &rest[end..]
            }
        };
        parameters.push((key, value));
    }
    parameters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_parsed_with_commas_in_quotes() {
        let header = r#"Bearer realm="https://auth.x/token",service="reg \"a\"",scope="repository:a/b:pull,push""#;
        let Some(Challenge::Bearer { realm, service, scope }) = Challenge::parse(header) else {
            panic!("not parsed")
        };
        assert_eq!(realm, "https://auth.x/token");
        assert_eq!(service.unwrap(), "reg \"a\"");
        assert_eq!(scope.unwrap(), "repository:a/b:pull,push");
        assert_eq!(Challenge::parse("Basic realm=x"), Some(Challenge::Basic));
        assert_eq!(Challenge::parse("Bearer scope=x"), None);
        assert_eq!(
            Challenge::parse("Bearer realm=\"unclosed"),
            Some(Challenge::Bearer { realm: "unclosed".into(), service: None, scope: None })
        );
        assert_eq!(Challenge::parse("Negotiate abc"), None);
    }

    #[test]
    fn credentials_stay_with_their_registry() {
        let auth = Auth {
            username: "u".into(),
            password: "p".into(),
            server_address: "https://index.docker.io/v1/".into(),
            ..Auth::default()
        };
        assert!(auth.credentials("docker.io") != Credentials::None);
        assert!(auth.credentials("evil.example") == Credentials::None);
    }

    #[test]
    fn the_auth_field_holds_user_and_password() {
        let auth = Auth { auth: STANDARD.encode("user:pa:ss"), ..Auth::default() };
        let expected = Credentials::Basic { username: "user".into(), password: "pa:ss".into() };
        assert!(auth.credentials("x") == expected);
        let auth = Auth { auth: "%%%".into(), ..Auth::default() };
        assert!(auth.credentials("x") == Credentials::None);
    }

    #[test]
    fn secrets_are_not_printed() {
        let auth =
            Auth { password: "hunter2".into(), registry_token: "tok".into(), ..Auth::default() };
        let text = format!("{auth:?}");
        assert!(!text.contains("hunter2") && !text.contains("tok"));
    }
}
