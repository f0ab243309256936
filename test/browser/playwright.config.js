// Playwright 1.61 is the last release that runs on Debian 12's Node.js.
import {defineConfig} from '@playwright/test'

// The tests use the distribution's browser, and the service at WRENN_URL.
export default defineConfig({
	testDir: '.',
	outputDir: process.env.WRENN_BROWSER_OUT ?? '../../.cache/browser',
	forbidOnly: true,
	workers: 1,
	timeout: 120_000,
	expect: {timeout: 30_000},
	reporter: 'list',
	use: {
		baseURL: process.env.WRENN_URL,
		screenshot: 'on',
		launchOptions: {
			executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
			args: ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--no-first-run',
				// The host names in origins.spec.js.
				'--host-resolver-rules=MAP *.example.com 127.0.0.1, MAP *.example.net 127.0.0.1'],
		},
	},
})
