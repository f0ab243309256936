// Shows the document of this page in the colours that the reader's system prefers.
(() => {
	const mono = {fontFamily: 'ui-monospace, monospace'}
	const light = {
		colors: {primary: {main: '#2563eb'}},
		sidebar: {backgroundColor: '#f6f7f9'},
		rightPanel: {backgroundColor: '#1d2026'},
	}
	const dark = {
		colors: {
			primary: {main: '#7aa8ff'},
			text: {primary: '#d7dae0', secondary: '#9aa1ad'},
			gray: {50: '#1d2026', 100: '#262a31'},
			border: {dark: '#3a3f48', light: '#2b2f36'},
			success: {main: '#4fbf7b'}, warning: {main: '#d9a441'}, error: {main: '#f07171'},
			responses: {
				success: {color: '#4fbf7b', backgroundColor: '#16241c', tabTextColor: '#4fbf7b'},
				error: {color: '#f07171', backgroundColor: '#2a1a1c', tabTextColor: '#f07171'},
				redirect: {color: '#d9a441', backgroundColor: '#29231a', tabTextColor: '#d9a441'},
				info: {color: '#7aa8ff', backgroundColor: '#1a2130', tabTextColor: '#7aa8ff'},
			},
		},
		schema: {nestedBackground: '#1a1d22', typeNameColor: '#9aa1ad', typeTitleColor: '#9aa1ad', requireLabelColor: '#f07171', linesColor: '#4a505b'},
		sidebar: {backgroundColor: '#1a1d22', textColor: '#d7dae0'},
		rightPanel: {backgroundColor: '#0e1013'},
		codeBlock: {backgroundColor: '#1a1d22'},
		typography: {code: {color: '#f0a0a0', backgroundColor: '#262a31'}, links: {color: '#7aa8ff', visited: '#7aa8ff'}},
	}
	const preference = matchMedia('(prefers-color-scheme: dark)')
	preference.addEventListener('change', () => location.reload())
	const theme = preference.matches ? dark : light
	theme.typography = {fontFamily: 'system-ui, sans-serif', headings: {fontFamily: 'system-ui, sans-serif', fontWeight: '600'}, ...theme.typography}
	theme.typography.code = {...mono, ...theme.typography.code}
	Redoc.init(JSON.parse(document.getElementById('document').textContent), {
		theme,
		hideDownloadButton: true,
		hideHostname: true,
		nativeScrollbars: true,
		sortRequiredPropsFirst: true,
		jsonSampleExpandLevel: 3,
	}, document.getElementById('docs'))
})()
